"""Saving, loading and publishing: what is loaded is what was saved, to the bit, and anything else is refused before it is read."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from intarsia import hub as hub_module
from intarsia import yaml_io
from intarsia.config import Config
from intarsia.files import DiskFullError
from intarsia.hub import Pretrained
from intarsia.hub_files import HubError, check_source, check_subfolder, fetch, push_folder, release_folder
from intarsia.registry import Registry
from intarsia.tensor_files import TensorFileError, read_header
from tests.hub_server import TOKEN, HubServer

TOYS: Registry[Any] = Registry("toy")


class ToyConfig(Config, registry=TOYS):
    """Base."""


class NetConfig(ToyConfig):
    """A small net."""

    width: int = 6
    """Features."""
    depth: int = 2
    """Layers."""
    scale: float = 1.0
    """No tensor shows it."""


class Toy(Pretrained, nn.Module):
    """What every room's base class sets."""

    registry: ClassVar[Registry[Any]] = TOYS
    kind: ClassVar[str] = "toy"

    def _spec_dict(self) -> dict[str, Any]:
        return {"classes": self.classes}

    @classmethod
    def _spec_from_dict(cls, tree: Mapping[str, Any]) -> int:
        return int(tree["classes"])


@TOYS.register("net", NetConfig)
class Net(Toy):
    def __init__(self, config: NetConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.embed = nn.Embedding(classes, config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, classes, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(config.width))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("ramp", torch.arange(config.width) * config.scale, persistent=False)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters() if name != "layers.1.bias"}


class OtherConfig(ToyConfig):
    """Another type."""

    width: int = 1
    """Features."""


@TOYS.register("other", OtherConfig)
class Other(Toy):
    def __init__(self, config: OtherConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.weight = nn.Parameter(torch.zeros(config.width))


def built(seed: int = 0, **changes: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(NetConfig(**changes), 4)
        net.count.uniform_()
        net.steps.fill_(7)
        return net


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    built().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


# What is loaded is what was saved --------------------------------------------------------------------------------
def test_every_tensor_comes_back_with_the_same_bits(saved: Path) -> None:
    net, loaded = built(), Toy.from_pretrained(saved)
    assert type(loaded) is Net and loaded.config == net.config and not loaded.training
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:  # ramp, which is in no file, too
        assert torch.equal(loaded.get_parameter(name) if name in dict(net.named_parameters()) else loaded.get_buffer(name), tensor), name
    assert loaded.head.weight is loaded.embed.weight
    assert (loaded.fingerprint, loaded.weights_sha256) == (net.fingerprint, net.weights_sha256)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_precision_keeps_it(tmp_path: Path, dtype: torch.dtype) -> None:
    net = built().to(dtype)
    net.save_pretrained(tmp_path)
    loaded = Toy.from_pretrained(tmp_path)
    assert loaded.embed.weight.dtype == dtype and torch.equal(loaded.count, net.count) and torch.equal(loaded.ramp, net.ramp)
    assert loaded.steps.dtype == torch.int64


def test_loading_leaves_the_callers_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Toy.from_pretrained(saved)
    assert torch.equal(torch.rand(2), expected)


def test_transposed_weights_come_back(tmp_path: Path) -> None:
    net = built()
    net.layers[0].weight = nn.Parameter(torch.arange(36.0).view(6, 6).t())
    net.save_pretrained(tmp_path)
    assert torch.equal(Toy.from_pretrained(tmp_path).layers[0].weight, net.layers[0].weight)


def test_saving_again_replaces_the_release_and_leaves_nothing_temporary(saved: Path) -> None:
    built(seed=1).save_pretrained(saved)
    assert Toy.from_pretrained(saved).fingerprint == built(seed=1).fingerprint
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_config_json_is_renamed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), replace(a, b))[1])
    built().save_pretrained(tmp_path)
    assert names[-1] == "config.json" and sorted(names) == ["README.md", "config.json", "model.safetensors"]


def test_other_people_read_the_weights_with_safetensors(saved: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(saved / "model.safetensors")
    assert set(tensors) == {"embed.weight", "count", "steps", *(f"layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias"))}
    assert torch.equal(tensors["embed.weight"], built().embed.weight)


def test_a_module_that_its_configuration_does_not_build_is_not_saved(tmp_path: Path) -> None:
    net = built()
    net.layers[1] = nn.Linear(6, 6, bias=False)
    with pytest.raises(HubError, match=r"lacks tensors 'layers\.1\.bias'; it is not what its configuration builds"):
        net.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_class_that_would_load_as_another_is_not_saved(tmp_path: Path) -> None:
    class Forgotten(Net):
        """Of no name of its own."""

    with pytest.raises(HubError, match="Forgotten: the type '.*' is Net, which it would load as; register the class"):
        Forgotten(NetConfig(), 4).save_pretrained(tmp_path / "model")
    other = built()
    other.config = OtherConfig()
    with pytest.raises(HubError, match="Net: its configuration is of the type 'other'; expected that of"):
        other.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_folder_of_a_run_is_no_place_for_a_release(tmp_path: Path) -> None:
    """It would load as what lies in model/."""
    built().save_pretrained(tmp_path / "model")
    with pytest.raises(HubError, match="is the folder of a run, which loads as its model/; expected another folder"):
        built(1).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_release_of_a_run_folder_is_its_model(tmp_path: Path) -> None:
    built().save_pretrained(tmp_path / "model")
    assert release_folder(tmp_path) == str(tmp_path / "model")
    assert release_folder(tmp_path / "model") == str(tmp_path / "model")
    assert Toy.from_pretrained(tmp_path).weights_sha256 == Toy.from_pretrained(tmp_path / "model").weights_sha256
    for name in ("user/name", "user/name@v1", "user/name//tokenizer"):
        assert release_folder(name) == name
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").touch()
    with pytest.raises(HubError, match="begun/model: there is no such folder; the run has not released a model yet"):
        release_folder(tmp_path / "begun")


def test_b1_a_full_disk_is_named_and_leaves_nothing_torn(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))  # fails as a full disk does
            with pytest.raises(DiskFullError, match=r"model\.safetensors: .*: 464 bytes are needed, \d+ are free"):
                built().save_pretrained(tmp_path / "model")
            code = 0 if not list((tmp_path / "model").iterdir()) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Fingerprint -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["embed.weight", "layers.0.weight", "layers.1.bias", "count", "steps"])
def test_the_fingerprint_follows_its_tensors_and_the_sha256_all(name: str) -> None:
    net, changed = built(), built()
    tensors = changed.state_dict()
    tensors[name].view(-1)[0] += 1
    counts = name in ("embed.weight", "layers.0.weight")
    assert (changed.fingerprint != net.fingerprint) == counts
    assert changed.weights_sha256 != net.weights_sha256


def test_the_fingerprint_follows_configuration_spec_and_dtype() -> None:
    torch.manual_seed(0)
    found = {built().fingerprint, built(scale=2.0).fingerprint, built().double().fingerprint, Net(NetConfig(), 5).fingerprint}
    assert len(found) == 4
    assert built().fingerprint == built().fingerprint


def test_the_fingerprint_is_that_of_the_weights_as_they_are_now() -> None:
    net = built()
    before = net.fingerprint
    net.embed.weight.data[0, 0] += 1  # a change that no version counter sees
    assert net.fingerprint != before


# Anything else is refused ------------------------------------------------------------------------------------------
def test_a_flipped_bit_in_the_weights_is_an_error_that_shows_both_hashes(saved: Path) -> None:
    for name, key in (("count", "sha256"), ("embed.weight", "fingerprint")):
        place = read_header(saved / "model.safetensors")[name].start
        content = bytearray((saved / "model.safetensors").read_bytes())
        content[place] ^= 1
        (saved / "model.safetensors").write_bytes(content)
        with pytest.raises(HubError, match=rf"model\.safetensors: the {key} is [0-9a-f]{{64}}; config\.json says [0-9a-f]{{64}}"):
            Toy.from_pretrained(saved)
        content[place] ^= 1
        (saved / "model.safetensors").write_bytes(content)
    assert Toy.from_pretrained(saved)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (lambda t: t.update(format="model/2"), r"format 'model/2'; this version of intarsia reads 'model/1'"),
    "another kind": (lambda t: t.update(kind="prior"), r"holds a 'prior'; expected a 'toy'"),
    "unknown type": (lambda t: t.update(type="nett"), r"unknown toy 'nett'; did you mean 'net'"),
    "two types": (lambda t: t.update(type="other"), r"config\.json: config\.type 'net' is no OtherConfig"),
    "misspelt key": (lambda t: t["config"].update(widht=6), r"config\.widht: unknown key; did you mean 'width'"),
    "wrong value": (lambda t: t["config"].update(width="6"), r"config\.width: .*integer.*got '6'"),
    "other scale": (lambda t: t["config"].update(scale=2.0), r"the fingerprint is [0-9a-f]{64}; config\.json says"),
    "other width": (lambda t: t["config"].update(width=5), r"tensor '\S+' is torch\.float32 \(.*6.*\); the model has .*5"),
    "more layers": (lambda t: t["config"].update(depth=3), r"lacks tensors 'layers\.2\.bias', 'layers\.2\.weight'"),
    "fewer layers": (lambda t: t["config"].update(depth=1), r"holds the unknown tensors 'layers\.1\.bias'"),
    "another dtype": (lambda t: t.update(dtype="float16"), r"is torch\.float32 .*; the model has torch\.float16"),
    "unknown dtype": (lambda t: t.update(dtype="device"), r"dtype 'device'; expected float32"),
    "spec": (lambda t: t.update(spec={}), r"config\.json: .*classes"),
    "missing key": (lambda t: t.pop("sha256"), r"the keys are .*; expected .*sha256"),
    "added key": (lambda t: t.update(auto_map={}), r"the keys are .*auto_map.*; expected"),
    "negative": (lambda t: t["config"].update(width=-1), r"config\.json: .*negative"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_does_not_fit_is_refused_in_one_line(saved: Path, name: str) -> None:
    change, message = CONFIGS[name]
    edit(saved, change)
    with pytest.raises(HubError, match=message) as error:
        Toy.from_pretrained(saved)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format": NaN}', b'{"a": 1, "a": 2}', b" " * (1 << 21)])
def test_a_config_that_is_no_bounded_json_is_refused(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(HubError, match=r"config\.json"):
        Toy.from_pretrained(saved)


def test_a_subclass_loads_its_own_type_only(saved: Path) -> None:
    assert type(Net.from_pretrained(saved)) is Net
    with pytest.raises(HubError, match="holds the type 'net', which is no Other"):
        Other.from_pretrained(saved)


# A fixed list of regular files -------------------------------------------------------------------------------
def only(suffix: str) -> Callable[[Path], Any]:
    return lambda f: (f / "model.safetensors").rename(f / suffix)


def linked(target: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "weights")
        (folder / "model.safetensors").symlink_to(target)

    return change


def swapped(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda f: ((f / "model.safetensors").unlink(), make(f / "model.safetensors"))


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "only .bin": (only("pytorch_model.bin"), r"model\.safetensors: there is no such file; a model is read from config\.json and model"),
    "only .pt": (only("model.pt"), "there is no such file"),
    "only .pkl": (only("model.pkl"), "there is no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: there is no such file"),
    "link out": (linked("../weights"), r"a symbolic link to '\.\./weights'"),
    "absolute link": (linked("/etc/hostname"), r"a symbolic link to '/etc/hostname'"),
    "dangling link": (linked("nowhere"), r"a symbolic link to 'nowhere'"),
    "folder": (swapped(lambda p: p.mkdir()), "expected a regular file"),
    "pipe": (swapped(os.mkfifo), "expected a regular file"),
}


@pytest.mark.parametrize("name", FILES)
def test_e2_a_folder_without_the_regular_files_is_refused(saved: Path, name: str) -> None:
    change, message = FILES[name]
    change(saved)
    with pytest.raises(HubError, match=message):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize("subfolder", ["..", "../x", "/etc", "a/../b", "a\\b", ".", "a//b", "a/", ".hidden", "a b"])
def test_e2_a_subfolder_that_is_no_plain_path_is_refused(saved: Path, subfolder: str) -> None:
    with pytest.raises(HubError, match="subfolder: "):
        Toy.from_pretrained(saved, subfolder=subfolder)
    assert check_subfolder("priors/0") == "priors/0"


@pytest.mark.parametrize("path", ["", "nothing-here", "../x/y", "a/b/c", "/nowhere", "https://x/y"])
def test_what_is_neither_folder_nor_hub_id_is_refused(path: str) -> None:
    with pytest.raises(HubError, match="is neither a folder nor a Hub id"):
        Toy.from_pretrained(path)


def test_a_misspelt_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tok", "prior"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for path, hint in (("runs/tokk", "did you mean 'runs/tok'? "), ("runs/xyz", ""), ("runs/tokk//x", "did you mean 'runs/tok'? ")):
        repo = path.split("//")[0]
        message = f"there is no folder '{repo}'; {hint}a repository of that name on the Hub is '{repo}@main'"
        with pytest.raises(HubError, match=f"^{re.escape(message)}$"):
            Toy.from_pretrained(path)
    with pytest.raises(HubError, match="^tokenizer: there is no folder 'runs/tokk'"):
        check_source("tokenizer", "runs/tokk")
    for path in ("runs/tok", "runs/tokk@main", "user/name", "user/name@v1//priors/0"):
        check_source("tokenizer", path)


@pytest.mark.parametrize("name", ["a/b@", "a/b//", "a/b@v1@v2", "@v1", "a@v1"])
def test_a_name_with_an_empty_or_second_part_is_no_hub_id(name: str) -> None:
    with pytest.raises(HubError, match="is neither a folder nor a Hub id"):
        check_source("", name)


def test_e2_files_of_other_names_are_never_asked_for(saved: Path) -> None:
    with pytest.raises(HubError, match=r"files: 'pytorch_model\.bin' is none of"):
        fetch(saved, ["pytorch_model.bin"])


@pytest.fixture
def unpickled() -> Iterator[list[str]]:
    """What is unpickled while the fixture lives; an audit hook cannot be taken away again, so that it is switched off."""
    seen: list[str] = []
    active = [True]
    sys.addaudithook(lambda event, args: seen.append(event) if active[0] and event.startswith(("pickle.", "torch.load")) else None)
    yield seen
    active[0] = False


def test_e1_nothing_is_unpickled_by_saving_and_loading(saved: Path, unpickled: list[str]) -> None:
    built().save_pretrained(saved)
    Toy.from_pretrained(saved)
    assert unpickled == []
    import pickle

    pickle.loads(pickle.dumps(Path()))
    assert unpickled, "the hook itself works"


# Safetensors without trust ----------------------------------------------------------------------------------
def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2,), start: Any = 0, stop: Any = 8, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]} | more


HEADERS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length beyond the file": safetensors(b"{}", length=1 << 40),
    "length of all ones": safetensors(b"{}", length=(1 << 64) - 1),
    "no json": safetensors(b"{x}"),
    "deep": safetensors(b"[" * 100_000),
    "a list": safetensors([]),
    "header over 1 MB": safetensors(b" " * (1 << 20) + b"{}"),
    "unknown dtype": safetensors({"a": entry(dtype="C64")}, b"12345678"),
    "dtype no text": safetensors({"a": entry(dtype=[])}, b"12345678"),
    "shape against bytes": safetensors({"a": entry(shape=(3,))}, b"12345678"),
    "negative shape": safetensors({"a": entry(shape=(-1, -2))}, b"12345678"),
    "shape overflows": safetensors({"a": entry(shape=(1 << 62, 4))}, b"12345678"),
    "float shape": safetensors({"a": entry(shape=(2.0,))}, b"12345678"),
    "true shape": safetensors({"a": entry(shape=(True, 2))}, b"12345678"),
    "offsets reversed": safetensors({"a": entry(start=8, stop=0)}, b"12345678"),
    "beyond the end": safetensors({"a": entry()}, b"1234567"),
    "bytes left over": safetensors({"a": entry()}, b"123456789"),
    "hole": safetensors({"a": entry(start=1, stop=9)}, b"123456789"),
    "overlap": safetensors({"a": entry(), "b": entry()}, b"12345678"),
    "added key": safetensors({"a": entry(more=1)}, b"12345678"),
    "no mapping": safetensors({"a": 1}, b"12345678"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_e3_a_malformed_safetensors_file_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(TensorFileError, match=r"a\.safetensors: no valid safetensors file") as error:
        read_header(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


def test_the_header_reader_agrees_with_safetensors(saved: Path) -> None:
    from safetensors import safe_open

    found = read_header(saved / "model.safetensors")
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert {name: list(e.shape) for name, e in found.items()} == {name: file.get_slice(name).get_shape() for name in list(file.keys())}


@pytest.mark.parametrize("files", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_e3_mutated_weights_files_raise_our_error_or_load_the_right_model(saved: Path, files: int) -> None:
    path = saved / "model.safetensors"
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    expected = built().weights_sha256
    refused = 0
    for _ in range(files):
        content = bytearray(good)
        kind, place, value = (int(v) for v in torch.randint(0, 1 << 30, (3,), generator=generator))
        place %= 900 if kind % 2 else len(content)  # half of them in the header
        if kind % 3 == 0:
            content[place] = value % 256
        elif kind % 3 == 1:
            del content[place : place + value % 64]
        else:
            content[place:place] = bytes([value % 256]) * (value % 16)
        path.write_bytes(content)
        try:
            assert Toy.from_pretrained(saved).weights_sha256 == expected
        except HubError:
            refused += 1
    assert refused > 0.8 * files


# The budget ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10**9}, r"the configuration needs 16000000000 bytes or more; max_bytes is \d+"),
        ({"width": 10**6}, r"the configuration needs \d{13} bytes or more; max_bytes is \d+"),
        ({"depth": 10**6}, r"the configuration makes more than 10000 tensors"),
        ({"width": 10**30}, r"config\.json: "),
    ],
    ids=["wide", "quadratic", "deep", "absurd"],
)
def test_e4_a_malicious_config_is_refused_before_anything_is_allocated(saved: Path, change: dict[str, int], message: str) -> None:
    edit(saved, lambda tree: tree["config"].update(change))
    pid = os.fork()
    if pid == 0:  # in a process of its own, so that its peak memory is its own
        code = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(HubError, match=message):
                Toy.from_pretrained(saved, max_bytes=8 << 30)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            code = 0 if grown * (1 if sys.platform == "darwin" else 1024) <= 50 << 20 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_budget_is_half_of_the_memory_unless_it_is_given(saved: Path) -> None:
    needed = sum(t.numel() * t.element_size() for t in [*built().parameters(), *built().buffers()])
    with pytest.raises(HubError, match=rf"max_bytes is {needed // 2}"):
        Toy.from_pretrained(saved, max_bytes=needed // 2)
    assert Toy.from_pretrained(saved, max_bytes=3 * needed)
    assert hub_module.default_max_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# The Hub ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.redirect(monkeypatch, tmp_path / "cache")
        yield server


def test_a_push_is_one_commit_of_the_fixed_files_and_comes_back(hub: HubServer) -> None:
    net = built()
    commit = net.push_to_hub("me/net", commit_message="First")
    repo = hub.repos["me/net"]
    assert [c.message for c in repo.commits] == ["initial commit", "First"] and repo.commits[-1].oid == commit
    assert set(repo.commits[-1].files) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert not repo.private
    assert Toy.from_pretrained("me/net").weights_sha256 == net.weights_sha256
    pulled = [path for method, path in hub.requests if method == "GET"]
    assert {path.rsplit("/", 1)[1] for path in pulled if "/resolve/" in path} == {"config.json", "model.safetensors"}


def test_the_card_tells_library_tags_license_and_metrics(hub: HubServer) -> None:
    built().push_to_hub("me/net", private=True, metrics={"psnr": 25.5}, license="mit")
    assert hub.repos["me/net"].private
    _, header, body = hub.repos["me/net"].commits[-1].files["README.md"].decode().split("---\n", 2)
    tree = yaml_io.load(header)
    assert tree["library_name"] == "intarsia" and tree["license"] == "mit" and set(tree["tags"]) >= {"toy", "net"}
    assert tree["model-index"][0]["results"][0]["metrics"] == [{"type": "psnr", "name": "psnr", "value": 25.5}]
    assert "from_pretrained" in body and "| psnr | 25.5 |" in body


def test_a_revision_is_pinned_and_branches_are_kept_apart(hub: HubServer) -> None:
    first = built().push_to_hub("me/net")
    second = built(seed=1).push_to_hub("me/net")
    built(seed=2).push_to_hub("me/net", revision="dev")
    for revision, seed in ((first, 0), (second, 1), (None, 1), ("main", 1), ("dev", 2)):
        assert Toy.from_pretrained("me/net", revision=revision).weights_sha256 == built(seed=seed).weights_sha256


def test_configuration_and_weights_come_from_one_commit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    built().push_to_hub("me/net")
    build = hub_module.build_on_meta

    def push_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(hub_module, "build_on_meta", build)
        built(seed=1).push_to_hub("me/net")
        return build(*args)

    monkeypatch.setattr(hub_module, "build_on_meta", push_meanwhile)
    assert Toy.from_pretrained("me/net").weights_sha256 == built().weights_sha256
    assert Toy.from_pretrained("me/net").weights_sha256 == built(seed=1).weights_sha256


def test_what_was_pulled_once_loads_without_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = built().push_to_hub("me/net")
    Toy.from_pretrained("me/net")
    asked = len(hub.requests)
    assert Toy.from_pretrained("me/net", local_files_only=True).weights_sha256 == built().weights_sha256
    assert Toy.from_pretrained("me/net", revision=commit, local_files_only=True)
    assert len(hub.requests) == asked
    with pytest.raises(HubError, match=r"me/other: config\.json is not in the cache"):
        Toy.from_pretrained("me/other", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    assert Toy.from_pretrained("me/net").weights_sha256 == built().weights_sha256
    with pytest.raises(HubError, match=r"me/other: config\.json is not in the cache"):
        Toy.from_pretrained("me/other")
    assert len(hub.requests) == asked


def test_a_snapshot_in_the_cache_is_a_folder_like_any_other(hub: HubServer) -> None:
    built().push_to_hub("me/net")
    snapshot = fetch("me/net", ["config.json", "model.safetensors"])
    assert (snapshot.folder / "config.json").is_symlink()
    assert Toy.from_pretrained(snapshot.folder).weights_sha256 == built().weights_sha256


def test_several_models_of_one_repository_load_alone(hub: HubServer, tmp_path: Path) -> None:
    for seed, name in enumerate(("tokenizer", "priors/0", "priors/1")):
        built(seed=seed).save_pretrained(tmp_path / "all" / name)
    (tmp_path / "all/pipeline.json").write_text("{}")
    push_folder("me/all", tmp_path / "all")
    assert len(hub.repos["me/all"].commits) == 2
    for seed, name in enumerate(("tokenizer", "priors/0", "priors/1")):
        assert Toy.from_pretrained("me/all", subfolder=name).weights_sha256 == built(seed=seed).weights_sha256
    first = fetch("me/all", ["pipeline.json"])
    assert fetch("me/all", ["priors/1/config.json"], revision=first.revision).folder == first.folder


def test_a_name_holds_revision_and_subfolder(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = []
    for seed in range(2):
        built(seed=seed).save_pretrained(tmp_path / "all" / "parts/net")
        commits.append(push_folder("me/all", tmp_path / "all", revision=f"v{seed}"))
    old, new = built(seed=0).weights_sha256, built(seed=1).weights_sha256
    for name, expected in (("@v0//parts/net", old), (f"@{commits[0]}//parts/net", old), ("@v1//parts/net", new), ("@v1//parts", new)):
        subfolder = "net" if name.endswith("parts") else ""
        assert Toy.from_pretrained(release_folder(f"me/all{name}"), subfolder=subfolder).weights_sha256 == expected, name
    assert Toy.from_pretrained("me/all@v0", subfolder="parts/net").weights_sha256 == old
    assert Toy.from_pretrained("me/all@v1//parts/net", revision=commits[0]).weights_sha256 == old, "a commit pins what a name found"
    with pytest.raises(HubError, match="revision: 'v1' was given, but the name me/all@v0 says 'v0'"):
        Toy.from_pretrained("me/all@v0//parts/net", revision="v1")
    with pytest.raises(HubError, match="me/all@v9//parts/net: there is no revision 'v9'"):
        Toy.from_pretrained("me/all@v9//parts/net")
    with pytest.raises(HubError, match="subfolder: '../x'"):
        Toy.from_pretrained("me/all//../x")
    monkeypatch.chdir(tmp_path)
    built(seed=2).save_pretrained(tmp_path / "me/all@v0")
    (tmp_path / "me/all@v0/README.md").unlink()
    assert Toy.from_pretrained("me/all@v0").weights_sha256 == built(seed=2).weights_sha256, "a folder of that name comes first"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"config\.json: has no 'format'"),
        ({"pytorch_model.bin": b"x"}, r"me/net: there is no config\.json; a model is read from config\.json and model\.safetensors only"),
    ],
)
def test_a_repository_without_the_files_is_refused(hub: HubServer, files: dict[str, bytes], message: str) -> None:
    hub.repo("me/net", files)
    with pytest.raises(HubError, match=message):
        Toy.from_pretrained("me/net")


def test_e2_a_repository_of_pickled_weights_is_refused_and_they_are_not_fetched(hub: HubServer, saved: Path) -> None:
    hub.repo("me/net", {"config.json": (saved / "config.json").read_bytes(), "pytorch_model.bin": b"x"})
    with pytest.raises(HubError, match=r"me/net: there is no model\.safetensors"):
        Toy.from_pretrained("me/net")
    assert not any(path.endswith(".bin") for _, path in hub.requests)


def test_a_malicious_config_is_refused_before_the_weights_are_fetched(hub: HubServer, saved: Path) -> None:
    edit(saved, lambda tree: tree["config"].update(width=10**9))
    hub.repo("me/net", {name: (saved / name).read_bytes() for name in ("config.json", "model.safetensors")})
    with pytest.raises(HubError, match="max_bytes"):
        Toy.from_pretrained("me/net")
    assert not any(path.endswith(".safetensors") for _, path in hub.requests)


def test_what_is_missing_on_the_hub_is_named(hub: HubServer) -> None:
    built().push_to_hub("me/net")
    with pytest.raises(HubError, match="me/none: there is no such folder, and no such repository"):
        Toy.from_pretrained("me/none")
    with pytest.raises(HubError, match="me/net: there is no revision 'v9'"):
        Toy.from_pretrained("me/net", revision="v9")
    with pytest.raises(HubError, match=r"me/net: there is no priors/0/config\.json"):
        Toy.from_pretrained("me/net", subfolder="priors/0")


def test_a_private_repository_needs_the_token_of_the_environment(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built().push_to_hub("me/net", private=True)
    assert Toy.from_pretrained("me/net")
    hub.redirect(monkeypatch, tmp_path / "empty", token=None)
    with pytest.raises(HubError, match=r"me/net: there is no such folder, and no such repository on the Hub \(or it is private\)"):
        Toy.from_pretrained("me/net")
    with pytest.raises(HubError, match="me/net: could not be published"):
        built().push_to_hub("me/net")


def test_a_push_without_a_network_is_one_line(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="me/net: could not be published"):
        built().push_to_hub("me/net")


def test_a_hub_that_is_out_of_order_is_one_line(hub: HubServer) -> None:
    hub.fail = 403
    with pytest.raises(HubError, match=r"^me/net: .*could not be (fetched|published)") as pulled:
        Toy.from_pretrained("me/net")
    with pytest.raises(HubError, match=r"^me/net: could not be published") as pushed:
        built().push_to_hub("me/net")
    assert "\n" not in str(pulled.value) + str(pushed.value)


def test_only_the_fixed_files_are_ever_published(hub: HubServer, saved: Path) -> None:
    (saved / ".env").write_text("SECRET=1")
    with pytest.raises(HubError, match=r"\.env: is none of config\.json"):
        push_folder("me/net", saved)
    (saved / ".env").unlink()
    (saved / "README.md").unlink()
    (saved / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(HubError, match="symbolic link"):
        push_folder("me/net", saved)
    assert hub.requests == []


def test_the_token_is_in_no_file_that_is_published_or_written(hub: HubServer, tmp_path: Path) -> None:
    built().push_to_hub("me/net")
    Toy.from_pretrained("me/net")
    pushed = b"".join(hub.repos["me/net"].commits[-1].files.values())
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert written and TOKEN.encode() not in pushed + written


def test_another_process_pushes_and_pulls_by_the_environment_alone(tmp_path: Path) -> None:
    code = """
from tests.test_hub import Toy, built
commit = built().push_to_hub("me/net")
assert Toy.from_pretrained("me/net", revision=commit).weights_sha256 == built().weights_sha256
print("done")
"""
    with HubServer() as server:
        done = server.run(code, tmp_path / "cache")
        assert done.returncode == 0 and done.stdout == "done\n", done.stderr
        assert len(server.repos["me/net"].commits) == 2
