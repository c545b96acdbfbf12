"""Which arguments and modules ``enable`` accepts, and the errors when no step runs under it."""

from pathlib import Path

from tests.forks import python

ROOT = Path(__file__).parents[2]


def run(program):
    return python("-c", program, cwd=ROOT)


def test_impossible_values_are_all_named():
    done = run("""
from megatron.adaptor import enable
for wrong in ({"splits": 0}, {"splits": "4"}, {"splits": True}, {"documents": "tokens"}):
    try:
        enable(**wrong)
    except ValueError as error:
        print(error)
enable(4, balance_method="even", schedule="zb", attention="flash")
""")
    assert done.returncode == 1
    for value in ("splits=0", "splits='4'", "splits=True"):
        assert f"{value}: must be a whole number of at least 1" in done.stdout
    assert "documents='tokens': must be one of None, 'cu_seqlens'" in done.stdout
    for complaint in (
        "balance_method='even': must be one of 'average', 'uniform_comp'",
        "schedule='zb': must be one of 'auto', '1f1b', 'zb-h1', 'greedy'",
        "attention='flash': must be one of None, ",
    ):
        assert complaint in done.stderr


def test_it_reaches_every_module_that_bound_the_name():
    done = run("""
import sys, types
from megatron.adaptor.cpu import device
device.install()
from megatron.core.pipeline_parallel import get_forward_backward_func as loops
import megatron.core.pipeline_parallel.schedules as schedules
other = types.ModuleType("somebodys_trainer")
other.get_loop = loops
sys.modules["somebodys_trainer"] = other
lazy = types.SimpleNamespace(get_loop=loops)
from megatron.adaptor import enable, install
enable(splits=1)
new = schedules.get_forward_backward_func
print(other.get_loop is new, loops is new, new.__wrapped__ is lazy.get_loop)
print("megatron.training" in sys.modules)
install().has_stepped = True
""")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-4:] == ["True", "True", "True", "False"]


def test_settings_that_no_step_has_read_are_an_error():
    done = run("from megatron.adaptor import enable; enable(splits=4)")
    assert done.returncode == 1
    assert "no step has read its settings: call get_forward_backward_func" in done.stderr


def test_an_error_of_the_loop_is_reported_alone():
    done = run("from megatron.adaptor import enable; enable(splits=4); raise KeyError('theirs')")
    assert done.returncode == 1
    assert "theirs" in done.stderr
    assert "no step has read" not in done.stderr


def test_installed_without_settings_says_once_that_nothing_is_on():
    done = run("""
from megatron.adaptor import install
install()
from megatron.core.pipeline_parallel import get_forward_backward_func
for _ in range(3):
    get_forward_backward_func(pp_size=1, vp_size=None)
""")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Seq1F1B is installed and nothing is on") == 1


def test_without_a_gpu_megatron_must_not_have_been_imported_first():
    done = run("import megatron.core; from megatron.adaptor import enable; enable()")
    assert done.returncode == 1
    assert "call megatron.adaptor.install() before the first import of Megatron" in done.stderr
