"""Files of prompt pairs: CSV or JSONL with the columns clean, corrupt, answer, distractor.

Tokens are separated by blanks; they are words of a vocabulary file with one token a line, or ids. All faulty lines of a
file are found before any is complained about, and the complaint names them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from workbench.models.config import ModelConfig
from workbench.runtime import WorkbenchError
from workbench.tasks.pairs import Pairs, encode, token_ids

COLUMNS = ("clean", "corrupt", "answer", "distractor")
NAMED = 5
"""Faulty lines that an error names."""


def read_pairs(path: Path, config: ModelConfig, vocab: Path | None) -> Pairs:
    """The pairs of a CSV or JSONL file, as the model reads them.

    Raises:
        WorkbenchError: the file is unreadable, or lines are faulty: it names them.
    """
    words = tuple(map(str, range(config.d_vocab))) if vocab is None else _vocabulary(vocab, config)
    ids = token_ids(words)
    rows = list(_rows(path))
    if not rows:
        raise WorkbenchError(f"{path} holds no pairs. Each line needs {', '.join(COLUMNS)}.")
    good: list[dict[str, tuple[int, ...]]] = []
    faults = []
    for line, row in rows:
        try:
            tokens = _encoded(row, ids)
            _check_pair(tokens, config, like=good[0] if good else tokens)
            good.append(tokens)
        except WorkbenchError as error:
            faults.append(f"line {line}: {error}")
    if faults:
        more = f" And {len(faults) - NAMED} more." if len(faults) > NAMED else ""
        raise WorkbenchError(f"{path}: {len(faults)} of {len(rows)} pairs are faulty. {' '.join(faults[:NAMED])}{more}")
    return Pairs(
        vocab=words,
        clean=tuple(tokens["clean"] for tokens in good),
        corrupt=tuple(tokens["corrupt"] for tokens in good),
        answer=tuple(tokens["answer"][0] for tokens in good),
        distractor=tuple(tokens["distractor"][0] for tokens in good),
        pad_token=config.pad_token,
        predictable=config.d_vocab_out,
    )


def _vocabulary(path: Path, config: ModelConfig) -> tuple[str, ...]:
    lines = _text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if len(line.split()) != 1:
            raise WorkbenchError(
                f"{path}, line {number}: {line!r} is not one token. Give one a line, without blanks: prompts split "
                "there."
            )
    words = tuple(line.strip() for line in lines)
    if len(words) != config.d_vocab or len(set(words)) != len(words):
        raise WorkbenchError(
            f"{path} has {len(words)} tokens, {len(set(words))} of them different; the model has {config.d_vocab}. "
            "Give one token a line, in the order of their ids."
        )
    return words


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Line number and columns of each pair."""
    match path.suffix.lower():
        case ".jsonl":
            yield from _json_rows(path, _text(path))
        case ".csv":
            yield from _csv_rows(path, _text(path))
        case _:
            raise WorkbenchError(f"Pairs come as .csv or .jsonl, got {path.name!r}.")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    # Only at line ends: JSON strings may hold the other separators that splitlines() knows.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise WorkbenchError(f"{path}, line {line} is not JSON: {error}.") from error
            if not isinstance(row, Mapping):
                raise WorkbenchError(f"{path}, line {line} is not a JSON object with {', '.join(COLUMNS)}.")
            yield line, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        if header and (missing := [column for column in COLUMNS if column not in header]):
            raise WorkbenchError(f"{path} lacks the column {', '.join(missing)}. It needs {','.join(COLUMNS)}.")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise WorkbenchError(f"{path}, line {reader.line_num} is not CSV: {error}.") from error


def _encoded(row: Mapping[str, object], ids: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    if missing := [column for column in COLUMNS if row.get(column) in (None, "", [])]:
        raise WorkbenchError(f"{', '.join(missing)} is missing.")
    return {column: encode(_words(row[column]), ids) for column in COLUMNS}


def _words(value: object) -> list[str]:
    """Tokens of a cell: a string with blanks between them; in JSON also a list, or one number."""
    return [str(token) for token in value] if isinstance(value, list) else str(value).split()


def _check_pair(
    tokens: Mapping[str, tuple[int, ...]], config: ModelConfig, *, like: Mapping[str, tuple[int, ...]]
) -> None:
    clean, corrupt = tokens["clean"], tokens["corrupt"]
    if len(clean) != len(corrupt):
        raise WorkbenchError(f"clean has {len(clean)} tokens and corrupt {len(corrupt)}; they must align one to one.")
    if len(clean) > config.n_ctx:
        raise WorkbenchError(f"{len(clean)} tokens are more than the model reads ({config.n_ctx}).")
    if config.pad_token is None and len(clean) != len(like["clean"]):
        raise WorkbenchError(
            f"prompts of {len(clean)} tokens after prompts of {len(like['clean'])}: they differ in length, and the "
            "model has no padding token."
        )
    if config.pad_token in (*clean, *corrupt):
        raise WorkbenchError(f"a prompt holds the padding token ({config.pad_token}).")
    if clean == corrupt:
        raise WorkbenchError("clean and corrupt are the same prompt.")
    for column in ("answer", "distractor"):
        if len(tokens[column]) != 1 or tokens[column][0] >= config.d_vocab_out:
            raise WorkbenchError(
                f"{column} must be one token that the model predicts (ids 0 to {config.d_vocab_out - 1})."
            )


def _text(path: Path) -> str:
    try:
        # Spreadsheets begin their UTF-8 with a mark of its own.
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkbenchError(f"Cannot read {path}: {error}.") from error
