"""Links from page to page that carry the run along."""

from __future__ import annotations

import streamlit as st


def link_to(url_path: str, label: str, run: str, *, icon: str | None = None) -> None:
    """A link to the page at a path of this app, opened on a run."""
    # Streamlit knows a page by its path alone, so that a stand-in serves and views need not know main.py.
    page = st.Page(lambda: None, title=label, url_path=url_path)
    st.page_link(page, label=label, icon=icon, query_params={"run": run})
