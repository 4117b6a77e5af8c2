"""Where weights may come from: addresses with checksums, folders, the Hub, timm."""

from __future__ import annotations

import hashlib
import json
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from maskformer.checkpoint import checkpoint_metadata, load_weights, read_state_dict, remote
from maskformer.checkpoint.sources import fetch_source, local_source
from maskformer.errors import UserError

from .conftest import SWIN
from .test_files import STATE, Response, save
from .test_loading import equal, randomised

Make = Callable[..., nn.Module]


# ------------------------------------------------------------------ https and detectron2
@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A server of one file: ``data``, the addresses ``asked`` for, ``offline``; the cache is ``cache``."""
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    served: dict[str, Any] = {"asked": [], "offline": False, "cache": tmp_path / "cache"}
    served["data"] = save(tmp_path / "source", "pickle").read_bytes()

    def open_address(request: Any, timeout: float) -> Response:
        if served["offline"]:
            raise urllib.error.URLError("no route")
        served["asked"].append(request.full_url)
        return Response(served["data"], len(served["data"]))

    monkeypatch.setattr(remote.urllib.request, "urlopen", open_address)
    return served


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_sum_is_kept_beside_the_file(web: dict[str, Any]) -> None:
    read_state_dict("https://example.org/a/b.pkl")
    kept = web["cache"] / "example.org/a/b.pkl.sha256"
    assert kept.read_text() == f"{digest(web['data'])}  b.pkl\n"


def test_a_file_that_was_damaged_since_is_downloaded_again(
    web: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    read_state_dict("https://example.org/b.pkl")
    path = web["cache"] / "example.org/b.pkl"
    path.write_bytes(b"x" + web["data"][1:])
    assert read_state_dict("https://example.org/b.pkl").keys() == STATE.keys()
    assert path.read_bytes() == web["data"]
    assert len(web["asked"]) == 2
    assert "was damaged since it was downloaded" in caplog.text
    path.write_bytes(b"x")
    web["offline"] = True
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route\): fetch it elsewhere"):
        read_state_dict("https://example.org/b.pkl")


def test_a_promised_sum_is_checked(web: dict[str, Any]) -> None:
    right, wrong = digest(web["data"]), digest(b"")
    with pytest.raises(UserError, match=rf"what arrives has SHA-256 {right}, not {wrong}"):
        read_state_dict(f"https://example.org/b.pkl#sha256={wrong}")
    assert not (web["cache"] / "example.org/b.pkl").exists()
    read_state_dict(f"https://example.org/b.pkl#sha256={right.upper()}")
    assert web["asked"] == ["https://example.org/b.pkl"] * 2
    with pytest.raises(UserError, match=rf"b\.pkl has SHA-256 {right}, not the {wrong} of .*: delete it"):
        read_state_dict(f"https://example.org/b.pkl#sha256={wrong}")
    with pytest.raises(UserError, match=r"ends in #md5=1: only #sha256="):
        read_state_dict("https://example.org/b.pkl#md5=1")


def test_the_digits_in_names_of_torchvision_files_are_checked(web: dict[str, Any]) -> None:
    read_state_dict(f"https://download.pytorch.org/models/resnet50-{digest(web['data'])[:8]}.pth")
    with pytest.raises(UserError, match=r"not 00000000"):
        read_state_dict("https://download.pytorch.org/models/resnet50-00000000.pth")
    read_state_dict("https://example.org/resnet50-00000000.pth")


def test_a_file_put_there_by_hand_is_taken(web: dict[str, Any]) -> None:
    path = web["cache"] / "example.org/b.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(web["data"])
    web["offline"] = True
    assert read_state_dict("https://example.org/b.pkl").keys() == STATE.keys()


def test_query_and_port_tell_files_apart(web: dict[str, Any]) -> None:
    addresses = [
        *("https://example.org/b.pkl", "https://example.org/b.pkl?version=1", "https://example.org/b.pkl?version=2"),
        *("https://example.org:8443/b.pkl", "https://example.org:8443/b.pkl?version=1"),
    ]
    paths = {local_source(address) for address in (*addresses, *addresses)}
    assert len(paths) == 5
    assert web["asked"] == addresses
    assert web["cache"] / "example.org/b.pkl" in paths
    assert all(path is not None and path.suffix == ".pkl" for path in paths)
    assert local_source("https://example.org:443/b.pkl") == web["cache"] / "example.org/b.pkl"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://[bad/x.pkl", r"is no address \("),
        ("https://example.org:port/x.pkl", r"is no address \("),
        ("https://example.org/%ff.pkl", r"is no address \("),
        ("https://example.org/a%00b.pkl", r"is not an address weights can be read from"),
        ("https://../x.pkl", r"is not an address weights can be read from"),
        ("https://./x.pkl", r"is not an address weights can be read from"),
        ("https://example.org/%2e%2e/x.pkl", r"is not an address weights can be read from"),
        (f"https://example.org/{'a' * 300}/x.pkl", r"has a part of more than 180 bytes"),
        (f"https://example.org/{'a/' * 3000}x.pkl", r"or 1000 in all"),
    ],
    ids=range(9),
)
def test_odd_addresses_are_one_sentence(web: dict[str, Any], address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_state_dict(address)
    assert "\n" not in str(caught.value)
    assert web["asked"] == []


def test_a_file_in_the_place_of_a_folder_of_the_cache(web: dict[str, Any]) -> None:
    read_state_dict("https://example.org/a")
    with pytest.raises(UserError, match=r"example\.org/a is a file where a folder of the cache must be.*: delete it"):
        read_state_dict("https://example.org/a/b.pkl")
    read_state_dict("https://example.org/c/d.pkl")
    with pytest.raises(UserError, match=r"example\.org/c is a folder where a file of the cache must be.*: delete it"):
        read_state_dict("https://example.org/c")
    assert len(web["asked"]) == 2


# ------------------------------------------------------------------ folders
def make_folder(folder: Path, kind: str) -> Path:
    """`STATE` in Hugging Face's layout."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(STATE, folder / "pytorch_model.bin")
    else:
        ending = "safetensors" if kind == "safetensors shards" else "bin"
        table = {}
        for i, (name, tensor) in enumerate(STATE.items(), start=1):
            table[name] = f"part-{i}-of-2.{ending}"
            if ending == "bin":
                torch.save({name: tensor}, folder / table[name])
            else:
                safetensors.torch.save_file({name: tensor}, folder / table[name])
        whole = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
        (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


KINDS = ("safetensors", "bin", "safetensors shards", "bin shards")


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_read(tmp_path: Path, kind: str) -> None:
    tensors = read_state_dict(make_folder(tmp_path / "model", kind))
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "bin shards")
    (folder / "part-2-of-2.bin").unlink()
    with pytest.raises(UserError, match=r"index\.json names part-2-of-2\.bin, which is not there"):
        read_state_dict(folder)
    index = folder / "pytorch_model.bin.index.json"
    for outside in ("../secret.bin", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(UserError, match="which is no file of its folder"):
            read_state_dict(folder)
    for nothing in ("", ".."):
        index.write_text(json.dumps({"weight_map": {"a": nothing}}))
        with pytest.raises(UserError, match="which is no file of its folder"):
            read_state_dict(folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match=r"index\.json has an empty weight_map"):
        read_state_dict(folder)
    for damaged in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match="is damaged, it has no weight_map"):
            read_state_dict(folder)


def test_a_folder_without_metadata_of_ours_names_no_classes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "safetensors")
    assert checkpoint_metadata(folder) is None
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        checkpoint_metadata(folder)


# ------------------------------------------------------------------ the Hugging Face Hub
@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's own cache with the model ``someone/model`` (branch ``main``, tag ``v1``), and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub/models--someone--model"
    commit = "0" * 40
    make_folder(model / "snapshots" / commit, "safetensors shards")
    (model / "refs").mkdir()
    for name in ("main", "v1"):
        (model / "refs" / name).write_text(commit)
    return model / "snapshots" / commit


@pytest.mark.parametrize("address", ["hf://someone/model", "hf://someone/model@v1"])
def test_models_of_the_hub_come_from_its_cache(hub_cache: Path, address: str) -> None:
    assert local_source(address) == hub_cache
    assert read_state_dict(address).keys() == STATE.keys()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://someone/other", r"config\.json is not in the Hub's cache and the Hub cannot be reached"),
        ("hf://someone/model@v2", r"is not in the Hub's cache"),
        ("hf://model", r"write hf://owner/name"),
        ("hf://a/b@v 1", r"write hf://owner/name"),
        ("hf://a--/b", r"hf://a--/b cannot be downloaded \("),
    ],
)
def test_models_that_are_not_there(hub_cache: Path, address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fetch_source(address)
    assert "\n" not in str(caught.value)


def test_what_the_hub_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def answer(error: Exception) -> Callable[..., str]:
        def fail(*arguments: Any, **options: Any) -> str:
            raise error

        return fail

    class Gone(errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404\nlong page")

    class NoRevision(errors.RevisionNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    for error, message in (
        (Gone(), r"is not on the Hugging Face Hub, or not for you"),
        (NoRevision(), r"without revision 'x'"),
        (errors.EntryNotFoundError("404"), r"has no config\.json"),
        (OSError("disk full\nmore"), r"cannot be downloaded \(disk full\)"),
    ):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer(error))
        with pytest.raises(UserError, match=message):
            read_state_dict("hf://a/b@x")


# ------------------------------------------------------------------ timm
@pytest.fixture
def timm_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """timm's pre-trained weights are random here: the same for each name. Returns the names asked for."""
    create, asked = timm.create_model, []

    def fake(name: str, pretrained: bool = False, **options: Any) -> Any:
        if not pretrained:
            return create(name, pretrained=False, **options)
        asked.append(name)
        if name == "resnet34":
            raise RuntimeError("no connection\nat all")
        torch.manual_seed(7)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", fake)
    return asked


def test_timm_resnets_fill_our_resnets(small_model: Make, timm_files: list[str]) -> None:
    model = small_model()
    report = load_weights(model, "timm://resnet18.a1_in1k")
    assert (report.path, report.missing, report.unexpected) == ("timm://resnet18.a1_in1k", [], [])
    theirs = timm.create_model("resnet18", pretrained=True)
    for name, tensor in model.state_dict().items():
        if name.startswith("network.backbone.body."):
            assert torch.equal(tensor, theirs.state_dict()[name.removeprefix("network.backbone.body.")]), name
    fetch_source("timm://resnet18")
    assert checkpoint_metadata("timm://resnet18") is None


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "resnet18"])
def test_timm_weights_fill_the_same_timm_backbone(small_model: Make, timm_files: list[str], name: str) -> None:
    settings = {"MODEL__BACKBONE__NAME": "timm", "MODEL__TIMM__NAME": name}
    model = small_model(**settings)
    report = load_weights(model, f"timm://{name}")
    assert (report.missing, report.unexpected) == ([], [])
    torch.manual_seed(7)
    theirs = timm.create_model(name, pretrained=False, features_only=True).state_dict()
    own = {key.removeprefix("network.backbone.body."): t for key, t in model.state_dict().items() if ".body." in key}
    assert own
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in own.items())


def test_timm_weights_of_other_models_are_refused(small_model: Make, timm_files: list[str]) -> None:
    timm_model = small_model(MODEL__BACKBONE__NAME="timm", MODEL__TIMM__NAME="mobilenetv3_small_050")
    with pytest.raises(UserError, match=r"another model than MODEL\.TIMM\.NAME 'mobilenetv3_small_050'"):
        load_weights(timm_model, "timm://resnet18")
    with pytest.raises(UserError, match=r"no ResNet and no Swin.*set MODEL\.BACKBONE\.NAME timm and MODEL\.TIMM\.NAME"):
        load_weights(small_model(), "timm://mobilenetv3_small_050")
    with pytest.raises(UserError, match=r"check MODEL\.BACKBONE\.NAME"):
        load_weights(small_model(SWIN), "timm://resnet18")
    with pytest.raises(UserError, match=r"timm://resnet34 cannot be had \(no connection\)"):
        load_weights(small_model(), "timm://resnet34")
    with pytest.raises(UserError, match=r"timm://resnet_18 is no model of timm"):
        load_weights(small_model(), "timm://resnet_18")


@pytest.mark.parametrize(
    "name", ["resnetaa50", "resnetblur50", "resnet50c", "resnet50d", "resnet50_gn", "swin_s3_tiny_224"]
)
def test_other_architectures_of_timm_are_refused(small_model: Make, timm_files: list[str], name: str) -> None:
    """They have names and shapes of ours, but compute something else of them."""
    config = {"config": SWIN} if name.startswith("swin") else {"MODEL__RESNETS__DEPTH": 50}
    with pytest.raises(UserError, match=rf"no ResNet and no Swin of the kind.*MODEL\.TIMM\.NAME {name}$"):
        load_weights(small_model(**config), f"timm://{name}")
    assert timm_files == []


def test_the_deep_stem_of_timm_that_is_ours(small_model: Make, timm_files: list[str]) -> None:
    model = small_model(
        MODEL__BACKBONE__NAME="build_resnet_deeplab_backbone",
        MODEL__RESNETS__STEM_TYPE="deeplab",
        MODEL__RESNETS__STEM_OUT_CHANNELS=128,
        MODEL__RESNETS__DEPTH=50,
    )
    report = load_weights(model, "timm://resnet50s")
    assert (report.missing, report.unexpected) == ([], [])


def test_swins_of_timm_divide_stages_otherwise(tmp_path: Path, small_model: Make) -> None:
    """Weights with timm's names give our network timm's maps, where timm's way of shifting is the published one."""
    depths, heads = (2, 2, 2, 2), (1, 2, 2, 4)
    torch.manual_seed(0)
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=12, depths=depths, num_heads=heads, features_only=True
    ).eval()
    whole = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=depths, num_heads=heads)
    model = small_model(SWIN).eval()
    randomised(whole)
    torch.save(whole.state_dict(), tmp_path / "swin.pth")
    report = load_weights(model, tmp_path / "swin.pth")
    assert (report.family, report.unexpected) == ("timm Swin", [])
    assert report.missing == [f"network.backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    state = {key.replace("layers.", "layers_", 1): tensor for key, tensor in whole.state_dict().items()}
    theirs.load_state_dict({key: tensor for key, tensor in state.items() if key in theirs.state_dict()})
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        maps = theirs(images)
        ours = model.network.backbone(images)
        for i, name in enumerate(("res2", "res3", "res4")):
            normed = getattr(model.network.backbone, f"norm{i}")(maps[i])
            assert torch.allclose(ours[name], normed.permute(0, 3, 1, 2), atol=1e-3), name


def test_swins_equal_after_a_round_trip(tmp_path: Path, small_model: Make) -> None:
    source, model = randomised(small_model(SWIN)), small_model(SWIN)
    state = {key.removeprefix("network.backbone."): t for key, t in source.state_dict().items() if ".backbone." in key}
    moved = {}
    for key, tensor in state.items():
        _, number, rest = [*key.split(".", 2), "", ""][:3]
        moved[f"layers.{int(number) + 1}.{rest}" if rest.startswith("downsample.") else key] = tensor
    torch.save(moved, tmp_path / "swin.pth")
    assert load_weights(model, tmp_path / "swin.pth").family == "timm Swin"
    assert equal(model, source, "network.backbone.")
