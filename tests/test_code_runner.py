"""Programs that a model wrote: what is right passes, what is wrong in any way does not, and does no harm."""

import os
import socket
import threading
import time

import pytest

from moesaic.evaluation import code_runner
from moesaic.evaluation.code_runner import check_runner, run_program

RIGHT = "def double(x):\n    return 2 * x\n"
TEST = "def check(candidate):\n    assert candidate(3) == 6\ncheck(double)\n"
PATIENT = 60  # other work may fill the machine


@pytest.fixture(params=[True, False], ids=["namespaces", "hook"])
def guarded(request, monkeypatch):
    """With what the kernel may give, and without."""
    monkeypatch.setattr(code_runner, "NAMESPACES", request.param)


def reason(source, **limits):
    found = run_program(source, **({"time_s": PATIENT} | limits))
    assert not found.passed
    return found.reason


def test_an_empty_program_and_a_right_one_pass(guarded):
    check_runner()
    assert run_program(RIGHT + TEST, PATIENT) == (True, "")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def double(x):\n    return 3 * x\n" + TEST, "AssertionError"),
        ("def double(x:\n" + TEST, "SyntaxError: "),
        ("double = 1 / 0\n" + TEST, "ZeroDivisionError: division by zero"),
        ("raise ValueError('a\\n' * 10_000)", "ValueError: a a a"),
        ("class Odd(Exception):\n    def __str__(self): raise SystemExit\nraise Odd", "Odd"),
        ("def double(x):\n    return double(x)\n" + TEST, "RecursionError: maximum recursion depth"),
        (f"import sys\nsys.exit(0)\n{RIGHT + TEST}", "SystemExit: 0"),
        (f"import os\nos._exit(0)\n{RIGHT + TEST}", "ended before its tests did, with exit code 0"),
        (f"raise KeyboardInterrupt\n{RIGHT + TEST}", "KeyboardInterrupt"),
        ("x = input()", "EOFError"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)", "PermissionError: os.kill is refused"),
    ],
)
def test_what_is_wrong_does_not_pass(source, says):
    assert reason(source).startswith(says)
    assert len(reason(source)) <= 200


def test_what_says_that_it_passed_without_the_number_does_not():
    forged = 'import os\nfor fd in range(3, 256):\n    try: os.write(fd, b\'{"nonce": "", "error": null}\')\n'
    assert reason(forged + "    except OSError: pass\nos._exit(0)") == "wrote where only its runner writes"
    assert reason("import os\nos.closerange(0, 100)\n").startswith("ended before its tests did")


def test_a_process_that_the_program_forked_has_no_say():
    assert reason("import os\nif os.fork(): raise ValueError('parent')") == "ValueError: parent"
    assert reason("import os, time\nif os.fork(): time.sleep(600)", time_s=1.5) == "took longer than 1.5 s"


@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(600)"])
def test_what_does_not_end_is_ended(source):
    start = time.monotonic()
    assert reason(source, time_s=1.5) == "took longer than 1.5 s"
    assert time.monotonic() - start < 30


def test_processor_time_is_limited_beside_the_clock():
    busy = "import threading, time\ndef loop():\n    while True: pass\n"
    threads = "for _ in range(2): threading.Thread(target=loop).start()\ntime.sleep(600)"
    lower = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 2))\n"
    assert "of the processor" in reason(busy + lower + threads)
    later = "import resource\nassert resource.getrlimit(resource.RLIMIT_CPU)[0] > 20"
    assert run_program(later, time_s=20).passed  # so that what one thread does is ended by the clock


def test_output_without_end_is_not_kept():
    noisy = "import sys, os\nwhile True:\n    print('x' * 1_000_000)\n    print('y' * 1_000_000, file=sys.stderr)\n"
    before = memory()
    assert reason(noisy, time_s=2) == "took longer than 2 s"
    assert memory() - before < 50e6
    assert run_program("print('x' * 10_000_000)\n" + RIGHT + TEST, PATIENT).passed


def memory():
    import psutil

    return psutil.Process().memory_info().rss


def test_memory_is_limited():
    assert reason("x = bytearray(2**31)", memory_bytes=2**29).startswith("MemoryError")
    assert reason("x = []\nwhile True: x.append(' ' * 2**20)", memory_bytes=2**28)
    assert run_program("x = bytearray(2**27)", PATIENT, 2**29).passed


def test_a_process_that_outlives_its_program_is_killed(tmp_path, guarded):
    outlive = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nopen('x', 'w').close()\n"
    before = set(os.listdir("/proc"))
    assert run_program(outlive, PATIENT).passed
    deadline = time.monotonic() + 20
    while (left := ours(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert "leave its process group" in reason("import os\nos.setsid()")
    assert "16 processes at most" in reason("import os\nfor _ in range(17): os.fork() or os._exit(0)")


def ours(before):
    """Processes of the runner that were not there before."""
    found = []
    for number in set(os.listdir("/proc")) - before:
        if number.isdigit():
            try:
                with open(f"/proc/{number}/cmdline", "rb") as file:
                    found += [number] if b"code_child.py" in file.read() else []
            except OSError:
                pass
    return found


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=5)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT', timeout=5)",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
    ],
)
def test_there_is_no_network_and_no_other_program(attempt, guarded):
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = []
        threading.Thread(target=lambda: reached.append(server.accept()), daemon=True).start()
        said = reason(attempt.replace("PORT", str(server.getsockname()[1])))
        assert "refused to programs that a model wrote" in said
        assert not reached


@pytest.mark.parametrize(
    "attempt",
    [
        "open(PATH, 'w')", "open(PATH, 'a')", "import os\nos.open(PATH, os.O_RDWR)", "import os\nos.remove(PATH)",
        "import os\nos.rename(PATH, 'mine')", "import shutil, os\nshutil.rmtree(os.path.dirname(PATH))",
        "import pathlib\npathlib.Path(PATH).write_text('')", "import os\nos.symlink(PATH, 'x')\nopen('x', 'w')",
        "import os\nos.chmod(PATH, 0)", "import os\nos.truncate(PATH, 0)", "import os\nos.mkdir(PATH + 'x')",
        "import os\nos.open('kept.txt', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open(os.path.dirname(PATH), os.O_RDONLY))",
    ],
)  # fmt: skip
def test_files_change_in_the_programs_folder_alone(attempt, tmp_path, guarded):
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    assert reason(attempt.replace("PATH", repr(str(kept)))).startswith(("PermissionError", "OSError: [Errno 30]"))
    assert kept.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_program_has_a_folder_of_its_own_and_nothing_else(tmp_path, monkeypatch, guarded):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.chdir(tmp_path)
    look = (
        "import os, sys\nassert os.listdir() == []\nassert 'SECRET' not in os.environ\nassert sys.flags.isolated\n"
        "open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'\nos.mkdir('b')\nos.remove('a.txt')\n"
        f"assert os.getcwd() != {str(tmp_path)!r}\nopen(os.devnull, 'w').write('x')\n"
    )
    assert run_program(look, PATIENT) == (True, "")
    assert run_program(look, PATIENT) == (True, "")
    assert list(tmp_path.iterdir()) == []
    again = "import os, shutil, tempfile\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nshutil.rmtree('a')\n"
    assert run_program(again + "assert os.listdir() == []", PATIENT) == (True, "")
    assert "File too large" in reason("open('a', 'wb').write(b'x' * 2**25)")


def test_ordinary_programs_run(guarded):
    many = (
        "from dataclasses import dataclass\nimport collections, hashlib, math, random, re, string, typing\n"
        "@dataclass\nclass Point:\n    x: 'int'\nassert Point(1) == Point(1)\nassert __name__ != '__main__'\n"
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n"
    )
    assert run_program(many, PATIENT) == (True, "")
