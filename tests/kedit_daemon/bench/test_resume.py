import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.bench.resume import (
    OPTIONS_FILE,
    RunProgress,
    describe_options,
    keep_work,
    load_result,
    open_method_folder,
    save_result,
)
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError

GIVEN: dict[str, Any] = {"limit": 20, "seed": 0, "layers": (1, 2)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


@pytest.fixture
def folder(out: Path) -> Path:
    return out.with_name("out.json.work")


def cut(out: Path, resume: bool = True, **changed: Any) -> None:
    with pytest.raises(ZeroDivisionError), keep_work(out, resume, GIVEN | changed):
        raise ZeroDivisionError


def test_work_stays_after_a_cut_and_goes_when_the_run_is_done(out: Path, folder: Path) -> None:
    cut(out)
    assert json.loads((folder / OPTIONS_FILE).read_text())["layers"] == [1, 2]
    with keep_work(out, True, GIVEN) as work:
        assert work == folder
        with open_method_folder(work, "wise", 10) as own:
            (own / "facts").write_text("some")
    assert not folder.exists()


def test_without_resume_nothing_is_kept_and_older_work_goes_when_the_run_is_done(
    out: Path, folder: Path
) -> None:
    cut(out, resume=False)
    assert not folder.exists()
    cut(out)
    cut(out, resume=False, seed=1)  # what was done is not lost by a run that came to nothing
    assert folder.is_dir()
    with keep_work(out, False, GIVEN) as work:
        assert work is None
    assert not folder.exists()
    with keep_work(None, False, GIVEN) as work:
        assert work is None


def test_work_of_other_options_is_refused_by_their_names(out: Path, folder: Path) -> None:
    cut(out)
    other = GIVEN | {"limit": 21, "more": 1}
    with (
        pytest.raises(KeditError, match=r"another limit, more$") as caught,
        keep_work(out, True, other),
    ):
        raise AssertionError("the run began")
    assert caught.value.code == "work" and caught.value.hint is not None
    assert str(folder) in caught.value.hint
    assert folder.is_dir()


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(out: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with (
        pytest.raises(KeditError, match="not the work folder"),
        keep_work(out, True, GIVEN),
    ):
        raise AssertionError("the run began")
    with keep_work(out, False, GIVEN):
        pass
    assert (folder / "letter.txt").is_file()
    folder.joinpath("letter.txt").unlink()
    cut(out)  # an empty one is that of a run that was cut off at once
    (folder / OPTIONS_FILE).write_text("{")
    with (
        pytest.raises(KeditError, match="not the work folder"),
        keep_work(out, True, GIVEN),
    ):
        raise AssertionError("the run began")


def test_a_method_has_its_own_folder(tmp_path: Path) -> None:
    with (
        open_method_folder(tmp_path, "wise", 10) as one,
        open_method_folder(tmp_path, "wise", 5) as other,
    ):
        assert one.parent == other.parent == tmp_path and one != other
    assert one.is_dir()
    with open_method_folder(None, "wise", 10) as passing:
        assert passing.is_dir()
    assert not passing.exists()


def test_progress_and_result_are_what_was_written(tmp_path: Path) -> None:
    assert RunProgress.load(tmp_path) == RunProgress()
    assert load_result(tmp_path) is None
    some = RunProgress([1.5, 2.0], 0.5, {"solve": 1.0}, 3)
    some.save(tmp_path)
    assert RunProgress.load(tmp_path) == some
    save_result(tmp_path, {"facts": 3, "strict": None})
    assert load_result(tmp_path) == {"facts": 3, "strict": None}


def test_options_tell_data_and_model_by_what_is_in_them(
    load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    loaded, one, two = load("llama"), tmp_path / "one", tmp_path / "two"
    one.write_text("[]")
    two.write_text("[]")

    def options(data: Path, **more: Any) -> dict[str, Any]:
        given = {"data": data, "model": "m", "resume": True, "json_file": data, "plot": None}
        return describe_options(loaded, data, given | {"seed": 0, "limit": None} | more)

    first = options(one)
    assert first == options(two, model="another place")
    assert first["model"] == loaded.base_hash and first["seed"] == 0
    assert json.loads(json.dumps(first))["site"]["side_layer"] == loaded.site.side_layer
    two.write_text("[1]")
    assert options(two)["data"] != first["data"]
    assert options(one, seed=1) != first
