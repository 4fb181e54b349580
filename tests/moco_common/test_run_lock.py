"""Who may write a run directory: its holder while it lives, on whatever host."""

import os
import shutil
import threading

import pytest

from moco_common.errors import UserError
from moco_common.run_lock import NAME, RunLock


def in_another_process(folder):
    """0 where another process gets the lock, 1 where it is refused in this one's name."""
    child = os.fork()
    if child == 0:
        try:
            with RunLock(folder):
                os._exit(0)
        except UserError as error:
            refused = f"Another run is using {folder} (process {os.getppid()} on" in str(error)
            os._exit(1 if refused else 2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(tmp_path):
    with RunLock(tmp_path):
        assert in_another_process(tmp_path) == 1
    assert in_another_process(tmp_path) == 0


def test_a_holder_on_another_host_is_noticed_while_it_lives_and_passed_over_when_dead(tmp_path):
    path, done = tmp_path / NAME, threading.Event()
    path.write_text('{"host": "elsewhere", "pid": 7}\n')

    def live():
        while not done.wait(0.02):
            os.utime(path)

    other = threading.Thread(target=live)
    other.start()
    with pytest.raises(UserError, match="process 7 on elsewhere"), RunLock(tmp_path, beat=0.1):
        pass
    done.set()
    other.join()
    with RunLock(tmp_path, beat=0.1):
        pass
    assert path.read_text() == ""


@pytest.mark.parametrize("left", [b"process 123", b"7", b"\xff{", b"[]", b""])
def test_what_other_versions_left_in_the_folder_confuses_nobody(tmp_path, left):
    (tmp_path / ".lock").write_bytes(b"process 123")
    (tmp_path / NAME).write_bytes(left)
    with RunLock(tmp_path):
        assert in_another_process(tmp_path) == 1


def test_a_lock_that_is_not_held_leaves_nothing(tmp_path):
    with RunLock(tmp_path / "run", held=False):
        assert not (tmp_path / "run").exists()


def append(file):
    with file.open("a"):
        pass


def lose(folder):
    with RunLock(folder):
        shutil.rmtree(folder)
        append(folder / "metrics.json")


def test_a_directory_removed_under_a_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="run was removed while"):
        lose(tmp_path / "run")
    with pytest.raises(FileNotFoundError), RunLock(tmp_path / "run"):
        append(tmp_path / "elsewhere" / "metrics.json")
