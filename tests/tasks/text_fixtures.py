"""Archives as pip downloads them and models as transformers writes them, all tiny and made on the spot."""

import io
import random
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from workbench.store import digest
from workbench.tasks import text, text_sources

GOOD, BAD = ("great", "good", "fine"), ("terrible", "bad", "poor")
FILLERS = ("a", "this", "movie", "product", "is", "negative", "positive", "plot", "cast", "it", "was", "very")
PACKED = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"


def rated_lines(n, seed=0):
    """Sentences with a rating, in documents of three."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        good = rng.random() < 0.5
        words = [*rng.choices(FILLERS, k=5), rng.choice(GOOD if good else BAD)]
        rng.shuffle(words)
        rows.append(f"{number // 3}_{number % 3}\t{2.5 if good else -2.5}\t{' '.join(words)} {number}")
    return rows


def write_ratings(folder, rows, monkeypatch):
    """An archive of ratings in a data folder that is now the user's, pinned instead of the real one."""
    packed, content = io.BytesIO(), "\n".join(rows).encode("latin1")
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in ("movieReviewSnippets", "amazonReviewSnippets"):
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return write_archive(folder, "RATINGS", {PACKED: packed.getvalue()}, monkeypatch)


def write_archive(folder, which, members, monkeypatch):
    """An archive with these members under the pinned one's file name."""
    archive = getattr(text_sources, which)
    path = Path(folder) / archive.file
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    text._splits.cache_clear()
    monkeypatch.setattr(text_sources, which, replace(archive, sha256=digest(path.read_bytes())))
    monkeypatch.setenv("WORKBENCH_DATA", str(folder))
    return path


def write_encoder(folder, *, d_model=16, seed=0):
    """A BERT of two layers with random weights that knows the words above."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *GOOD, *BAD]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(words),
                hidden_size=d_model,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=2 * d_model,
                max_position_embeddings=32,
                initializer_range=0.3,
            )
        )
    model.save_pretrained(folder)
    return f"hf:{folder}"


def write_language_model(folder, *, d_model=16, seed=0):
    """A Llama of two layers with random weights, two heads that share keys, and the words above and of the prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[UNK]", '"', "has", "tone", "that", *FILLERS, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=d_model,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=2 * d_model,
                max_position_embeddings=32,
                initializer_range=0.3,
                tie_word_embeddings=True,
            )
        )
    model.save_pretrained(folder)
    return f"hf:{folder}"
