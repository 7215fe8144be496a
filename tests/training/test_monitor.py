"""`training/monitor.py` and `training/run_curves.py`: the live page of a run, and the curves that it draws."""

import json
import math
import re
import socket
import urllib.error
import urllib.request

import pytest
import ranks

from openchatkit import web
from openchatkit.errors import UserError
from openchatkit.formats import metrics, trace
from openchatkit.formats.trace import RankTrace, TraceSpan
from openchatkit.training import config, monitor
from openchatkit.training.monitor import Monitor
from openchatkit.training.run_curves import POINTS, RunCurves, make_timeline, render_page

FLAGS = ["--model-name", "m", "--task-name", "d", "--total-steps", "1"]


def row(step: int, **values: object) -> dict[str, object]:
    numbers = {"loss": 5 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 100.0, "seconds": 0.5}
    return {"step": step, **numbers, "trained_tokens": 9, "sources": {"a": {"loss": 1.0}}, **values}


@pytest.fixture
def served(tmp_path):
    """The monitor of a run of ten steps, of which two were taken before it was resumed."""
    for step in (1, 2):
        metrics.append(tmp_path, row(step))
    sink = Monitor(f"127.0.0.1:{ranks.free_port()}", tmp_path, total_steps=10)
    yield sink
    sink.close()
    assert not sink._thread.is_alive()


def address(sink: Monitor) -> str:
    return web.address_of(sink._server.servers[0].sockets[0]) if sink._server.started else ""


def ask(sink: Monitor, path: str, host: str | None = None) -> tuple[int, dict, bytes]:
    while not sink._server.started:
        assert sink._thread.is_alive()
    request = urllib.request.Request(address(sink) + path, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_the_page_has_the_steps_before_a_resume_and_those_that_follow(served, tmp_path):
    served.add_step(row(3, loss=None))
    served.add_evaluation({"step": 3, "evaluation_loss": 2.5, "evaluation_tokens": 4, "evaluation_sources": {}})
    served.add_step(row(4))
    status, _, body = ask(served, "/data")
    data = json.loads(body)
    (run,) = data["runs"]
    assert (status, run["steps"], run["loss"]) == (200, [1, 2, 3, 4], [5.0, 2.5, None, 1.25])
    assert (run["evaluation_steps"], run["evaluation_loss"], run["total_steps"]) == ([3], [2.5], 10)
    assert run["last"]["left"].startswith("0:")
    assert data["timeline"] is None
    (tmp_path / trace.TRACE).write_text("no trace")
    assert json.loads(ask(served, "/data")[2])["timeline"] is None
    trace.write(tmp_path / trace.TRACE, [RankTrace(0, spans=[TraceSpan("Update", 7, 1.0, 1.5)])])
    assert json.loads(ask(served, "/data")[2])["timeline"]["step"] == 7


def test_the_page_runs_its_own_script_alone_and_is_for_this_machine(served):
    status, headers, page = ask(served, "/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    text = page.decode()
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|insertAdjacentHTML|\bsrc=|\son\w+=", text) == []
    assert ask(served, "/data", host="localhost:80")[0] == 200
    assert ask(served, "/data", host="elsewhere.example")[0] == 403
    assert ask(served, "/nothing")[0] == 404


@pytest.mark.parametrize(
    ("given", "address"), [("127.0.0.1:80", None), (":8010", "127.0.0.1:8010"), ("[::1]:9", "[::1]:9")]
)
def test_addresses(given, address):
    assert config.parse([*FLAGS, "--monitor", given]).monitor == (address or given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.0.0.0:8010", "would show the run to other machines .* give 127.0.0.1:8010"),
        ("127.0.0.1", "expected an address such as 127.0.0.1:8010"),
        ("127.0.0.1:99999", "expected an address such as"),
    ],
)
def test_addresses_that_will_not_do(given, message):
    with pytest.raises(UserError, match=message):
        config.parse([*FLAGS, "--monitor", given])


def test_a_port_that_is_taken_ends_the_run_before_it_begins(tmp_path, flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--monitor 127.0.0.1:{port} cannot be listened on: .*; give another port"
        ):
            monitor.check_address(f"127.0.0.1:{port}")
        given = {**flags, "monitor": f"127.0.0.1:{port}", "checkpoint_path": tmp_path / "ckpt"}
        ended = ranks.train(tmp_path, given)
    assert ended.statuses == [2]
    assert ended.errors[0].count("\n") == 1
    assert not (tmp_path / "ckpt").exists()


def test_curves_of_many_steps_are_means_of_some():
    curves, steps = RunCurves("run"), 20 * POINTS + 3
    for step in range(1, steps + 1):
        curves.add(row(step, loss=float(step), grad_norm=None if step % 2 else 1.0))
    found = curves.to_json()
    assert POINTS <= len(found["steps"]) <= 2 * POINTS
    width = found["steps_a_point"]
    assert found["steps"][:2] == [width, 2 * width]
    assert found["steps"][-1] == found["last"]["step"] == steps
    assert found["loss"][1] == pytest.approx(sum(range(width + 1, 2 * width + 1)) / width)
    assert set(found["grad_norm"]) == {1.0}
    count = [width] * (len(found["steps"]) - 1)
    count.append(steps - sum(count))
    assert math.fsum(n * mean for n, mean in zip(count, found["loss"], strict=True)) == steps * (steps + 1) / 2


def test_a_timeline_shows_one_pipeline_in_the_middle_step():
    spans = [
        TraceSpan(kind, step, step + 0.0 + at, step + 0.1 + at, 0, 0)
        for step in (3, 4, 5)
        for kind, at in (("Forward", 0.0), ("Receive backward", 0.1), ("Backward", 0.2))
    ]
    ranks_ = [RankTrace(rank, replica=rank // 2, pipeline_rank=rank % 2, spans=spans) for rank in range(4)]
    found = make_timeline(ranks_)
    assert (found["step"], found["ranks"], [one["rank"] for one in found["rows"]]) == (4, 4, [0, 1])
    assert [box[0] for box in found["rows"][0]["boxes"]] == ["Forward", "Backward"]
    assert found["rows"][0]["waits"] == pytest.approx(1 / 3)
    assert found["milliseconds"] == pytest.approx(300)
    assert make_timeline([RankTrace(0)]) is None


def test_names_are_no_markup():
    page = render_page({"runs": [RunCurves("</script><b>").to_json()], "timeline": None})
    assert "</script><b>" not in page
    assert json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["runs"][0]["name"] == "</script><b>"


@pytest.mark.long
def test_the_page_in_a_browser_follows_the_run(served, chromium):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(state):
        return WebDriverWait(chromium, 60, poll_frequency=0.05).until(lambda _: state())

    def titles():
        return chromium.execute_script("return [...document.querySelectorAll('h2')].map((title) => title.textContent)")

    while not served._server.started:
        assert served._thread.is_alive()
    chromium.get(address(served))
    wait(lambda: titles() == ["Loss", "Learning rate", "Throughput", "Gradient norm"])
    assert "step 2 of 10, loss 2.5" in chromium.find_element("id", "state").text
    for step in range(3, 9):
        served.add_step(row(step))
    wait(lambda: "step 8 of 10" in chromium.find_element("id", "state").text)
    ActionChains(chromium).move_to_element(chromium.find_element("css selector", "section svg")).perform()
    wait(lambda: chromium.find_element("id", "tip").is_displayed())
    assert re.match(r"step [45]\nloss: 1(\.25)?$", chromium.find_element("id", "tip").text)
    ActionChains(chromium).move_to_element(chromium.find_element("id", "title")).perform()
    trace.write(served._folder / trace.TRACE, [RankTrace(0, spans=[TraceSpan("Forward", 7, 1.0, 1.5, 0, 3)])])
    wait(lambda: "What the ranks do in a step" in titles())
    assert [entry["message"] for entry in chromium.get_log("browser")] == []
    served.close()
    wait(lambda: "The run has ended" in chromium.find_element("id", "state").text)
    assert len(titles()) == 5
