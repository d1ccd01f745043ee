"""What the documents say of formats, configuration and files is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intarsia import checkpoint, hub, yaml_io
from intarsia import codes_manifest as codes
from intarsia.cli import parse
from intarsia.config import Config
from pipelines import saving
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.vqvae import VQVAEConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md")])


def section(title: str) -> str:
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def keys(*entries: type[Config]) -> list[str]:
    return [name for entry in entries for name in entry.model_fields]


CODES = keys(codes.Manifest, codes.LevelEntry, codes.SignalEntry, codes.TokenizerEntry)
CODES += keys(codes.ClassEntry, codes.SplitEntry, codes.ShardEntry)


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Codes: `codes/1`", [codes.FORMAT, codes.MANIFEST, *CODES]),
        ("Model: `model/1`", [hub.FORMAT, *hub._KEYS]),
        ("Pipeline: `pipeline/1`", [saving.FORMAT, saving.INDEX, *keys(saving.PipelineFile, saving.PartEntry)]),
        ("Checkpoint: `checkpoint/1`", [checkpoint.FORMAT, checkpoint.MANIFEST, "format", "step", "version", "meta", "sha256"]),
    ],
)
def test_formats_names_every_key(title, names):
    text = section(title)
    missing = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not missing, missing


def test_concepts_shows_three_spellings_of_one_tree():
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    ((python, yaml, flags),) = re.findall(r"```python\n(.*?)```\n```yaml\n(.*?)```\n```\n(.*?)```", text, re.DOTALL)
    from stage1_tokenizer.train import TokenizerTrainConfig

    config = eval(python, {"VQVAEConfig": VQVAEConfig, "VQConfig": VQConfig})
    assert config == VQVAEConfig.from_dict(yaml_io.load(yaml)) == parse(TokenizerTrainConfig, ["--run", "r", *flags.split()])[0].tokenizer
    assert config != VQVAEConfig()


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_no_document_waits_for_its_figures(document):
    text = document.read_text(encoding="utf-8")
    assert not re.findall(r"^TABLE$|\b[A-Z]+_FIGURES\b|\bTODO\b|\bTBD\b", text, re.MULTILINE)
