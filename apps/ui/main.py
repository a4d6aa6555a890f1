"""The pages and their order, and nothing else."""

import streamlit as st

from apps.ui.state import user_errors_shown
from apps.ui.views import circuit, dynamics, explore, graft, program, report, runs, search, train

st.set_page_config(page_title="Interp Workbench", layout="wide")
pages = [
    st.Page(runs.page, title="Runs", url_path="runs", default=True),
    st.Page(train.page, title="Train", url_path="train"),
    st.Page(dynamics.page, title="Dynamics", url_path="dynamics"),
    st.Page(explore.page, title="Explore", url_path="explore"),
    st.Page(circuit.page, title="Circuit", url_path="circuit"),
    st.Page(search.page, title="Search", url_path="search"),
    st.Page(program.page, title="Program", url_path="program"),
    st.Page(graft.page, title="Graft", url_path="graft"),
    st.Page(report.page, title="Report", url_path="report"),
]
with user_errors_shown():
    st.navigation(pages).run()
