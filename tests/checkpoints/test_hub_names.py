"""From names to directories: built-in, here, in the hub's cache, on the hub (a small one on this machine)."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

import gptlab
from gptlab.checkpoints import hub
from gptlab.checkpoints.files import sha256_of
from gptlab.text.tokenizers import GPT2Tokenizer, gpt2_merges, gpt2_vocab

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def model() -> gptlab.GPT:
    # The published vocabulary, so that its tokenizer fits; everything else as small as it gets.
    return gptlab.GPT(gptlab.ModelConfig(n_layer=1, n_head=1, n_embd=4, context_length=16), seed=5)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as the hub has it: Hugging Face's layout with GPT-2's two tokenizer files."""
    directory = tmp_path_factory.mktemp("repository")
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 16}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name: (p.detach().t() if name.endswith(TURNED) else p.detach()).contiguous()
        for name, p in model().named_parameters()
    }
    save_file(tensors, directory / "model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        (directory / name).write_bytes(GPT2Tokenizer().files()[name])
    (directory / "README.md").write_text("not wanted")
    (directory / "pytorch_model.bin").write_bytes(b"not wanted either")
    return directory


def fill_cache(home: Path, repository: Path, name: str, *, shared_store: bool = False) -> Path:
    """Lay the repository out as huggingface_hub's cache does; return the blob of the weights."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    weights = root / "blobs" / sha256_of(repository / "model.safetensors")
    for file in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        # Large files are named by their sha256, small ones by git's sha1.
        content = (repository / file).read_bytes()
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        blob = weights if file == "model.safetensors" else root / "blobs" / sha1
        blob.write_bytes(content)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    if shared_store:
        # Since 2026 huggingface_hub keeps blobs of all repositories in one store, under another hash.
        stored = home / "hub" / "blobs" / "ab" / ("ab" * 32)
        stored.parent.mkdir(parents=True)
        weights.rename(stored)
        weights.symlink_to(Path("../../blobs/ab") / stored.name)
    return weights


def run(code: str, home: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process: huggingface_hub reads its variables when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment = {**inherited, "HF_HOME": str(home), **env}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


LOAD = """
import sys, gptlab
try:
    lm = gptlab.load({name!r})
    print(lm.model.wte.weight.double().sum().item(), lm.tokenizer.encode("The dog"))
except gptlab.GptlabError as error:
    print(error)
"""


def checksum() -> str:
    return f"{model().wte.weight.double().sum().item()} [464, 3290]"


# --- resolution -----------------------------------------------------------------------------------------------


def test_a_built_in_name_comes_before_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "built_in", lambda: {"pocket": Path("/assets/pocket")})
    (tmp_path / "pocket").mkdir()
    assert hub.locate("pocket") == Path("/assets/pocket")
    assert hub.locate("./pocket") == Path("./pocket")


def test_a_directory_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str | None, ...]] = []
    monkeypatch.setattr(hub, "download", lambda *names: asked.append(names) or Path("/from/the/hub"))
    for name in ("gpt2", "owner/name"):
        assert hub.locate(name) == Path("/from/the/hub")
        (tmp_path / name).mkdir(parents=True)
        assert hub.locate(name) == Path(name)
    assert asked == [("gpt2", "openai-community/gpt2", None), ("owner/name", "owner/name", None)]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gpt2-lagre", "no model 'gpt2-lagre' (did you mean 'gpt2-large'?)"),
        ("", "the name of the model is empty"),
        ("./here", "no file or directory ./here; check the path"),
        ("a/b/c", "no file or directory a/b/c; check the path"),
        ("../x", "no file or directory ../x; check the path"),
        ("/no/such/place", "no file or directory /no/such/place; check the path"),
    ],
)
def test_what_is_no_name_is_never_looked_up(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*names: str) -> Path:
        raise AssertionError(f"asked the hub for {names}")

    monkeypatch.setattr(hub, "download", never)
    with pytest.raises(gptlab.GptlabError) as caught:
        hub.locate(name)
    assert complaint in str(caught.value)


def test_a_file_that_no_format_recognises(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("")
    assert hub.locate(str(path)) == path
    for name in (str(path), path):
        with pytest.raises(gptlab.GptlabError, match=r"is a file that gptlab cannot read; it reads a directory"):
            gptlab.load(name)


def test_without_huggingface_hub_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(gptlab.GptlabError, match=r"pip install 'gptlab\[hub\]'"):
        hub.download("gpt2", "openai-community/gpt2")


# --- no network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HTTPS_PROXY": "http://127.0.0.1:9"}],
    ids=["offline", "nobody listens", "no proxy"],
)
def test_an_unreachable_hub_fails_fast_with_the_way_out(tmp_path: Path, network: dict[str, str]) -> None:
    # The clock starts after the imports, which are not what a network can delay.
    code = "import time, huggingface_hub, gptlab.language_model\nstarted = time.monotonic()\n" + LOAD.format(
        name="gpt2"
    )
    done = run(code + "print(time.monotonic() - started, file=sys.stderr)", tmp_path / "home", tmp_path, **network)
    for part in ("config.json, model.safetensors, vocab.json and merges.txt", "./gpt2", "same command", "'pocket'"):
        assert part in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert float(done.stderr.split()[-1]) < 15  # trying again and again would take minutes


# --- the hub's cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_store", [False, True])
def test_the_hubs_cache_serves_offline(tmp_path: Path, repository: Path, shared_store: bool) -> None:
    fill_cache(tmp_path / "home", repository, "openai-community/gpt2", shared_store=shared_store)
    done = run(LOAD.format(name="gpt2"), tmp_path / "home", tmp_path, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == checksum(), done.stdout + done.stderr


def test_a_revision_that_the_cache_lacks_is_named_offline(tmp_path: Path, repository: Path) -> None:
    blob = fill_cache(tmp_path / "home", repository, "owner/name")
    refs = blob.parents[1] / "refs"
    (refs / "pr").mkdir()
    (refs / "pr" / "1").write_text(COMMIT)
    (refs / "gone").write_text("f" * 40)  # a name whose files were never fetched
    # One process for all, since the imports take the time.
    names = ("owner/name@v9", f"owner/name@{COMMIT}", "owner/name@pr/1", "owner/none@v9")
    done = run("".join(LOAD.format(name=name) for name in names), tmp_path / "home", tmp_path, HF_HUB_OFFLINE="1")
    lacking, *there, nothing = done.stdout.splitlines()
    assert "the revision 'v9' of owner/name" in lacking, done.stdout + done.stderr
    assert lacking.endswith("its cache here holds main, pr/1: name owner/name@main")
    assert there == [checksum()] * 2
    assert "the revision 'v9' of owner/none" in nothing
    assert "to use it offline, put config.json" in nothing


def test_a_flipped_bit_in_the_hubs_cache_is_noticed(tmp_path: Path, repository: Path) -> None:
    blob = fill_cache(tmp_path, repository, "openai-community/gpt2")
    snapshot = blob.parents[1] / "snapshots" / COMMIT
    assert torch.equal(gptlab.load(snapshot).model.wte.weight, model().wte.weight)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1  # still a valid file, with a number that differs in its sign or least of bits
    blob.write_bytes(content)
    with pytest.raises(gptlab.GptlabError, match="its sha256 differs from the hub's; delete it and download it again"):
        gptlab.load(snapshot)


def test_a_blob_that_is_gone(tmp_path: Path, repository: Path) -> None:
    blob = fill_cache(tmp_path, repository, "openai-community/gpt2")
    blob.unlink()
    with pytest.raises(gptlab.GptlabError, match="holds no weights"):
        gptlab.load(blob.parents[1] / "snapshots" / COMMIT)


def test_a_copy_out_of_the_cache_is_a_plain_directory(tmp_path: Path, repository: Path) -> None:
    # Its file names are the user's, even those that look like a hash.
    plain = tmp_path / ("0" * 64)
    shutil.copytree(repository, plain)
    assert gptlab.load(plain).config == model().config


# --- a hub on this machine ------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub's interface as downloading takes, for owner/name and some that cannot be had.

    Attributes:
        files: contents by name.
        spoiled: the same, for what is sent in their place under the checksums of `files`.
        breaks: of how many answers with a large file only half is sent before the line goes dead.
        sent: names of files, in the order in which they were asked for.
        ranges: the parts of files that were asked for.
    """

    def __init__(self, repository: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in repository.iterdir()}
        self.spoiled: dict[str, bytes] = {}
        self.breaks = 0
        self.sent: list[str] = []
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


REFUSED = {
    "owner/private": (401, {}),  # so the hub answers for what is not there, too, where nobody is logged in
    "owner/gated": (403, {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model is restricted"}),
    "owner/down": (503, {}),
}
REVISIONS = ("main", "v1.0", "refs/pr/1", COMMIT)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        size = len(body)
        if asked := self.headers.get("Range"):
            self.server.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").split("-")[0])
            status, body = 206, body[first:]
            headers["Content_Range"] = f"bytes {first}-{size - 1}/{size}"
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            broken = self.server.breaks > 0 and len(body) > 10_000
            self.server.breaks -= broken
            self.wfile.write(body[: len(body) // 2] if broken else body)

    def do_GET(self) -> None:
        files, path = self.server.files, unquote(self.path.split("?")[0])
        for repository, (status, headers) in REFUSED.items():
            if repository in path:
                return self.answer(status, **headers)
        api = "/api/models/owner/name/"
        if path.startswith(f"{api}revision/"):
            if path.removeprefix(f"{api}revision/") not in REVISIONS:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        if re.fullmatch(f"{api}tree/[^/]+/.+", path):
            return self.answer(404, X_Error_Code="EntryNotFound")  # there are no folders in it
        if path == f"{api}tree/{COMMIT}":
            rows = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
            return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        if match := re.fullmatch(f"/owner/name/resolve/({'|'.join(REVISIONS)})/(.+)", path):
            name = match[2]
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            if self.command == "GET":
                self.server.sent.append(name)
            etag = hashlib.sha256(files[name]).hexdigest()
            body = self.server.spoiled.get(name, files[name])
            return self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def local_hub(repository: Path) -> Iterator[Hub]:
    server = Hub(repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_once_and_only_what_is_needed(tmp_path: Path, local_hub: Hub) -> None:
    for network in ({"HF_ENDPOINT": local_hub.url}, {"HF_HUB_OFFLINE": "1"}):
        done = run(LOAD.format(name="owner/name"), tmp_path / "home", tmp_path, **network)
        assert done.stdout.strip() == checksum(), done.stdout + done.stderr
    # Neither the pickle beside the safetensors nor the README, and nothing twice.
    assert sorted(local_hub.sent) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]


def test_every_way_in_which_the_hub_has_it_or_not(tmp_path: Path, local_hub: Hub) -> None:
    # One process for all, since the imports take the time.
    here = "there is no directory {0} here, and "
    expected = {f"owner/name@{revision}": re.escape(checksum()) for revision in REVISIONS} | {
        "owner/name@v2.0": here.format("owner/name") + "owner/name on the hub has no revision 'v2.0'; its branches, ",
        "owner/nane": "there is no directory owner/nane here and no public model owner/nane on the hub$",
        "owner/private": here.format("owner/private") + r".* without permission, or has no model of that name; ask for",
        "owner/gated": here.format("owner/gated") + r".* without permission.* and log in with `hf auth login`",
        "owner/down": here.format("owner/down") + r"the Hugging Face hub cannot be reached for owner/down .*offline",
    }
    code = "\n".join(LOAD.format(name=name) for name in expected)
    done = run(code, tmp_path / "home", tmp_path, HF_ENDPOINT=local_hub.url)
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stdout + done.stderr
    for line, pattern in zip(lines, expected.values(), strict=True):
        assert re.match(pattern, line), line
    assert len(local_hub.sent) == 4  # one commit under four names


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_what_another_program_fetched_is_enough_offline(
    tmp_path: Path, repository: Path, local_hub: Hub, network: dict[str, str]
) -> None:
    # As transformers leaves its cache: no merges.txt, beside a list of all files that the hub has.
    engine = Engine(models.BPE(vocab=gpt2_vocab(), merges=list(gpt2_merges())))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    local_hub.files["tokenizer.json"] = engine.to_str().encode()
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    cache = tmp_path / "home" / "hub"
    huggingface_hub.snapshot_download(
        "owner/name", endpoint=local_hub.url, cache_dir=cache, allow_patterns=wanted, max_workers=1
    )
    assert "merges.txt" not in {path.name for path in cache.rglob("*")}
    done = run(LOAD.format(name="owner/name"), tmp_path / "home", tmp_path, **network)
    assert done.stdout.strip() == checksum(), done.stdout + done.stderr


TRANSFORMERS = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("owner/name", dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained("owner/name")
print(model.transformer.wte.weight.double().sum().item(), tokenizer("The dog")["input_ids"])
"""


@pytest.mark.slow  # imports transformers in a process of its own
def test_what_transformers_fetched_is_enough_offline(tmp_path: Path, repository: Path, local_hub: Hub) -> None:
    engine = Engine(models.BPE(vocab=gpt2_vocab(), merges=list(gpt2_merges())))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    local_hub.files["tokenizer.json"] = engine.to_str().encode()
    theirs = run(TRANSFORMERS, tmp_path / "home", tmp_path, HF_ENDPOINT=local_hub.url)
    assert theirs.stdout.strip() == checksum(), theirs.stdout + theirs.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(local_hub.sent)
    asked = len(local_hub.sent)
    ours = run(LOAD.format(name="owner/name"), tmp_path / "home", tmp_path, HF_HUB_OFFLINE="1")
    assert ours.stdout.strip() == checksum(), ours.stdout + ours.stderr
    assert len(local_hub.sent) == asked


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path, local_hub: Hub) -> None:
    local_hub.breaks = 1
    # What came before the break counts in whole chunks, of 10 MB else.
    code = "import huggingface_hub.constants as c\nc.DOWNLOAD_CHUNK_SIZE = 4096\n" + LOAD.format(name="owner/name")
    done = run(code, tmp_path / "home", tmp_path, HF_ENDPOINT=local_hub.url)
    assert done.stdout.strip() == checksum(), done.stdout + done.stderr
    assert len(local_hub.ranges) == 1
    assert not local_hub.ranges[0].startswith("bytes=0")


def test_a_file_that_came_through_with_another_checksum_is_refused(tmp_path: Path, local_hub: Hub) -> None:
    content = bytearray(local_hub.files["model.safetensors"])
    content[-1] ^= 1
    local_hub.spoiled["model.safetensors"] = bytes(content)
    done = run(LOAD.format(name="owner/name"), tmp_path / "home", tmp_path, HF_ENDPOINT=local_hub.url)
    assert "is damaged: its sha256 differs from the hub's; delete it and download it again" in done.stdout, done.stderr


@pytest.mark.slow  # huggingface_hub tries several times, which is right for a flaky network
def test_a_download_that_breaks_off_is_one_sentence(tmp_path: Path, local_hub: Hub) -> None:
    local_hub.breaks = 10**6
    done = run(LOAD.format(name="owner/name"), tmp_path / "home", tmp_path, HF_ENDPOINT=local_hub.url)
    assert done.stdout.startswith("there is no directory owner/name here, and the Hugging Face hub cannot"), done.stderr
    assert "Traceback" not in done.stderr


# --- models inside other packages -------------------------------------------------------------------------------------


def test_a_model_inside_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PACKAGED", {"smollm2": ("a_package_with_a_model", "a-package")})
    with pytest.raises(gptlab.GptlabError, match=r"is in the package a-package, .*: pip install --no-deps a-package$"):
        hub.locate("smollm2")
    package = tmp_path / "a_package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('what the package needs is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(gptlab.GptlabError, match=r"pip install --no-deps a-package$"):
        hub.locate("smollm2")
    (package / "model.gguf").write_bytes(b"GGUF")
    assert hub.locate("smollm2") == package / "model.gguf"
