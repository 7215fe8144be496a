"""Hostfiles, and which slots of them a run takes."""

import re

import pytest

from openchatkit.errors import UserError
from openchatkit.neox import hosts
from openchatkit.neox.hosts import Host, find_hosts, read_hostfile, select_slots

HOSTS = {"a": (0, 1, 2, 3), "b": (0, 1)}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)


@pytest.fixture
def eight_gpus(tmp_path, monkeypatch):
    """A driver's command that lists eight GPUs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\nfor gpu in 0 1 2 3 4 5 6 7; do echo "GPU $gpu: A100 (UUID: x)"; done\n'
    )
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.fixture
def hostfile(write):
    return write("hosts", "# two machines\nworker-1 slots=4\n\n  worker-2   slots=2   rack=7\n")


def test_a_hostfile(hostfile):
    assert read_hostfile(hostfile) == {"worker-1": 4, "worker-2": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=1\na slots=2\n", r"hosts:2: a is there twice: leave one out"),
        ("a slots=1\nb\n", r"hosts:2: 'b': expected a line such as worker-1 slots=4"),
        ("a slots=0\n", r"hosts:1: 'a slots=0': expected a line such as"),
        ("a slots=two\n", r"hosts:1: 'a slots=two': expected"),
        ("# nothing\n\n", r"hosts names no host: expected lines such as worker-1 slots=4"),
    ],
)
def test_mistakes_in_a_hostfile(write, text, message):
    with pytest.raises(UserError, match=message):
        read_hostfile(write("hosts", text))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, HOSTS),
        ("a", None, {"a": (0, 1, 2, 3)}),
        ("b@a:0,2", None, {"a": (0, 2), "b": (0, 1)}),
        ("a:1", None, {"a": (1,)}),
        (None, "a", {"b": (0, 1)}),
        (None, "a:0,3@b:1", {"a": (1, 2), "b": (0,)}),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    assert select_slots(HOSTS, include=include, exclude=exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "include and exclude exclude each other: give one of them"),
        ("c", None, "include c: there is no host 'c': the hostfile has a, b"),
        ("a@b:2", None, "include a@b:2: b has no slot 2: it has 0 to 1"),
        ("a:", None, "include a:: 'a:': expected HOST, or HOST:SLOT,SLOT"),
        ("a:0-3", None, "include a:0-3: 'a:0-3': expected HOST, or HOST:SLOT,SLOT"),
        ("a@a:1", None, "include a@a:1: a is there twice"),
        (None, "a@b", "exclude a@b: no slot is left"),
        (None, "a:9", "exclude a:9: a has no slot 9: it has 0 to 3"),
    ],
)
def test_mistakes_of_include_and_exclude(include, exclude, message):
    with pytest.raises(UserError, match=re.escape(message)):
        select_slots(HOSTS, include=include, exclude=exclude)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [Host("worker-1", (0, 1, 2, 3)), Host("worker-2", (0, 1))]),
        ({"num_nodes": 1}, [Host("worker-1", (0, 1, 2, 3))]),
        ({"num_gpus": 2}, [Host("worker-1", (0, 1)), Host("worker-2", (0, 1))]),
        ({"include": "worker-2:1"}, [Host("worker-2", (1,))]),
        ({"global_num_gpus": 6}, [Host("worker-1", (0, 1, 2, 3)), Host("worker-2", (0, 1))]),
    ],
)
def test_hosts_of_a_configuration(configure, hostfile, monkeypatch, settings, expected):
    assert find_hosts(configure(hostfile=str(hostfile), **settings)) == expected
    monkeypatch.setenv("DLTS_HOSTFILE", str(hostfile))
    assert find_hosts(configure(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_nodes": 3}, r"num_nodes 3: there are 2 hosts: make it at most that"),
        ({"num_gpus": 3}, r"num_gpus 3: worker-2 has 2 slots: make it at most that"),
        ({"global_num_gpus": 8}, r"global_num_gpus 8: the hosts have 6 slots: leave it out"),
        (
            {"include": "worker-3"},
            r"include worker-3: there is no host 'worker-3': the hostfile has worker-1, worker-2",
        ),
        ({"hostfile": "/no/such"}, r"hostfile /no/such: there is no such file"),
    ],
)
def test_mistakes_of_hosts(configure, hostfile, settings, message):
    with pytest.raises(UserError, match=message):
        find_hosts(configure(**{"hostfile": str(hostfile)} | settings))


@pytest.mark.usefixtures("eight_gpus")
def test_this_machine_without_gpus(configure, monkeypatch, tmp_path):
    (tmp_path / "tools" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    for visible in ("", "0,1,2,3"):  # which does not make any
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert hosts.count_gpus() == 0
        assert find_hosts(configure(pipe_parallel_size=2)) == [Host(None, (0, 1))]  # one replica, on the processor
        assert find_hosts(configure(num_gpus=3)) == [Host(None, (0, 1, 2))]


@pytest.mark.usefixtures("eight_gpus")
def test_this_machine_with_gpus(configure, monkeypatch):
    config = configure(pipe_parallel_size=2)
    assert find_hosts(config) == [Host(None, tuple(range(8)))]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7,1")
    assert find_hosts(config) == [Host(None, (0, 1, 2, 3))]
    with pytest.raises(UserError, match=r"num_gpus 8: this machine has 4 GPUs: make it at most that"):
        find_hosts(configure(num_gpus=8))
    with pytest.raises(UserError, match=r"include a: it selects from a hostfile, and there is none"):
        find_hosts(configure(include="a"))


@pytest.mark.usefixtures("eight_gpus")
def test_slots_beyond_the_gpus_of_this_machine(configure, write):
    assert find_hosts(configure(hostfile=str(write("hosts", "localhost slots=8\n"))))[0].is_here
    with pytest.raises(UserError, match=r"slot 9 of localhost: this machine has 8 GPUs, 0 to 7"):
        find_hosts(configure(hostfile=str(write("hosts", "localhost slots=10\n"))))


def test_slurm(configure, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"launcher slurm: this is no Slurm job: run deepy.py in one, by sbatch or salloc"
    ):
        find_hosts(configure(launcher="slurm"))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    with pytest.raises(UserError, match="Slurm gives this job no GPUs: give num_gpus, the ranks a node"):
        find_hosts(configure(launcher="slurm"))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert find_hosts(configure(launcher="slurm")) == [Host("n1", (0, 1)), Host("n2", (0, 1))]


def test_names_of_this_machine():
    assert hosts.is_here("localhost")
    assert hosts.is_here("127.0.0.1")
    assert not hosts.is_here("192.0.2.1")
    assert not hosts.is_here("no-such-host.invalid")
