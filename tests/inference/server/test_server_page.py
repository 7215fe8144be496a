"""The chat page: what it is made of, and what it does in a real browser."""

import base64
import hashlib
import re

import pytest
from served import Broken, Refusing, Running

from openchatkit.inference.responder import Responder
from openchatkit.inference.retrieval.retriever import Retriever
from openchatkit.retrieval.passage import Passage

PATIENCE = 60  # seconds that the browser may take to come to a state; a test that passes does not wait for them


def page_of(running: Running) -> tuple[str, str]:
    """The head of the answer, and the page."""
    answer = running.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").decode()
    head, _, page = answer.partition("\r\n\r\n")
    return head, page


def test_the_page_fetches_nothing_from_elsewhere_and_never_sets_markup(trained):
    _, page = page_of(trained)
    assert re.findall(r"https?:|//\w+\.|@import|url\(|<link[^>]*href=\"(?!data:)|\bsrc=", page) == []
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|localStorage", page) == []
    )


def test_the_page_may_run_its_own_script_and_style_alone(trained):
    head, page = page_of(trained)
    policy = re.search(r"(?i)content-security-policy: (.*)\r\n", head + "\r\n")[1]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "x-content-type-options: nosniff" in head.lower()


def test_texts_run_as_their_script_does_and_settings_are_no_part_of_the_chat(trained):
    _, page = page_of(trained)
    assert re.findall(r'<textarea id="(\w+)"[^>]*dir="auto"', page) == ["system", "question"]
    assert 'text.dir = "auto"' in page
    assert page.index('id="settings"') < page.index("<main>")


# -- in a browser


@pytest.fixture
def browser(chromium):
    """Chromium, with a window of a phone's size."""
    # Its own window would be no narrower than 500 pixels.
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


class Page:
    """The page in a browser: what it shows, and what its user does."""

    def __init__(self, browser, running: Running) -> None:
        self._browser = browser
        browser.get(running.address)
        browser.execute_script("sessionStorage.clear()")
        self.complaints()  # those of the pages before are theirs
        self.reload()

    def reload(self) -> None:
        self._browser.refresh()

    def at(self, element: str):
        return self._browser.find_element("id", element)

    def shown(self, kind: str) -> list[str]:
        """The texts of the turns of a kind: user, assistant or note."""
        script = "return [...document.querySelectorAll(`.${arguments[0]} p`)].map((turn) => turn.textContent)"
        return self._browser.execute_script(script, kind)

    def wait(self, state) -> object:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self._browser, PATIENCE, poll_frequency=0.02).until(lambda _: state())

    def type(self, *keys: str) -> None:
        self.at("question").send_keys(*keys)

    def ask(self, text: str) -> None:
        """Ask with Enter, and wait until the reply is whole."""
        from selenium.webdriver.common.keys import Keys

        self.type(text, Keys.ENTER)
        self.wait(lambda: self.at("send").is_displayed() and not self.at("question").get_property("value"))

    def set(self, **settings: str) -> None:
        if not self.at("settings").is_displayed():
            self.at("toggle").click()
        for name, value in settings.items():
            self.at(name).clear()
            self.at(name).send_keys(value)
        self.at("toggle").click()

    def complaints(self) -> list[str]:
        """What the browser's console complains of, such as scripts that the page's policy stopped."""
        return [entry["message"] for entry in self._browser.get_log("browser") if entry["level"] != "VERBOSE"]


@pytest.mark.long
def test_a_chat_in_the_page(browser, trained):
    page = Page(browser, trained)
    page.wait(lambda: page.at("model").text == "tiny")
    page.ask("hello")
    page.ask("hello")
    assert (page.shown("user"), page.shown("assistant")) == (["hello", "hello"], ["first", "again"])
    page.reload()
    page.wait(lambda: page.shown("assistant") == ["first", "again"])
    page.at("new").click()
    page.wait(lambda: page.shown("user") == [])
    page.ask("lines")
    assert page.shown("assistant") == ["two\nlines"]
    # The page is no wider than a phone.
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.complaints() == []


@pytest.mark.long
def test_a_new_line_is_no_question_and_an_empty_one_is_none(browser, trained):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, trained)
    page.type(Keys.ENTER, " ", Keys.ENTER)
    page.at("question").clear()
    page.type("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert page.at("question").get_property("value") == "one\ntwo"
    assert page.shown("user") == []


@pytest.mark.long
def test_text_grows_and_stop_keeps_what_was_said(browser, endless):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, endless)
    page.set(max_tokens="1000000")
    page.type("go on", Keys.ENTER)
    first = page.wait(lambda: page.shown("assistant")[0])
    second = page.wait(lambda: len(text := page.shown("assistant")[0]) > len(first) and text)
    assert second.startswith(first)
    page.at("stop").click()
    page.wait(lambda: page.at("send").is_displayed())
    page.wait(lambda: not endless.worker.busy)
    kept = page.shown("assistant")
    assert kept[0].startswith(second)
    page.reload()
    page.wait(lambda: page.shown("assistant") == kept)
    page.set(max_tokens="4")
    page.ask("and more")
    page.wait(lambda: page.shown("note") == ["The reply reached its longest length."])


@pytest.mark.long
def test_a_reply_that_is_cut_stays_with_its_question(browser, serve, endless_model):
    from selenium.webdriver.common.keys import Keys

    with serve(endless_model, max_new_tokens=1_000_000) as running:
        page = Page(browser, running)
        page.type("go on", Keys.ENTER)
        first = page.wait(lambda: page.shown("assistant")[0])
        page.reload()
        assert page.wait(lambda: page.shown("assistant"))[0].startswith(first.strip())
        assert (page.shown("user"), page.shown("note")) == (["go on"], ["The reply was cut."])
        page.wait(lambda: not running.worker.busy)
        page.type("and on", Keys.ENTER)
        page.wait(lambda: len(page.shown("assistant")) == 2 and page.shown("assistant")[1])
    page.wait(lambda: page.at("send").is_displayed())
    assert page.shown("user") == ["go on", "and on"]
    assert page.shown("assistant")[1].startswith("la")
    assert page.shown("note")[1].startswith("The reply was cut. The ")
    page.type("once more", Keys.ENTER)
    page.wait(lambda: page.at("error").is_displayed())
    assert page.at("error").text == "The server cannot be reached: is it still running?"
    assert page.at("question").get_property("value") == "once more"


@pytest.mark.long
def test_settings_leave_a_long_chat_where_it_is(browser, serve, trained):
    page = Page(browser, trained)
    for _ in range(12):
        page.ask("lines")
    place = "return document.querySelector('main').scrollTop"
    browser.execute_script("document.querySelector('main').scrollTop = 150")
    page.at("toggle").click()
    assert browser.execute_script(place) == 150
    assert page.at("temperature").is_displayed()
    page.at("toggle").click()
    assert browser.execute_script(place) == 150


@pytest.mark.long
def test_markup_is_shown_as_text_on_both_sides(browser, serve, endless_model, responder_of):
    evil = "<img src=x onerror=\"document.title='forged'\"><script>document.title='forged'</script>"
    responder = responder_of(endless_model)

    def generate(*arguments: object, **options: object):
        """A model that says the same, whatever it is asked."""
        yield from responder.tokenizer.encode([evil])[0]

    responder.engine.generate = generate
    with serve(responder) as running:
        page = Page(browser, running)
        page.ask(evil)
        assert (page.shown("user"), page.shown("assistant")) == ([evil], [evil])
        page.reload()
        page.wait(lambda: page.shown("assistant") == [evil])
        assert browser.title == "OpenChatKit"
        assert browser.execute_script("return document.querySelectorAll('img').length") == 0
        assert page.complaints() == []


@pytest.mark.long
def test_an_error_is_shown_and_its_question_can_be_sent_again(browser, trained):
    page = Page(browser, trained)
    from selenium.webdriver.common.keys import Keys

    page.type("word " * 160, Keys.ENTER)
    page.wait(lambda: page.at("error").is_displayed())
    assert "leaves no room for a reply" in page.at("error").text
    assert page.shown("user") == []
    assert page.at("question").get_property("value") == "word " * 160
    page.at("question").clear()
    page.ask("hello")
    assert page.shown("assistant") == ["first"]
    assert not page.at("error").is_displayed()


@pytest.mark.long
def test_the_token_is_asked_for_and_kept_for_the_tab(browser, serve, trained):
    with serve(trained.responder, token="a-token-of-the-tests") as running:
        page = Page(browser, running)
        page.wait(lambda: "needs its token" in page.at("error").text)
        assert page.at("token").is_displayed()
        page.set(token="a-token-of-the-tests")
        page.wait(lambda: page.at("model").text == "tiny")
        page.ask("hello")
        assert page.shown("assistant") == ["first"]
        page.reload()
        page.wait(lambda: page.at("model").text == "tiny")
        assert "a-token" not in browser.current_url


@pytest.mark.long
def test_what_moderation_stopped_is_shown_and_not_sent_again(browser, serve, trained):
    plain = trained.responder
    moderated = Responder(plain.engine, plain.tokenizer, plain.rendering, moderator=Refusing("secret"))
    with serve(moderated) as running:
        page = Page(browser, running)
        page.ask("a secret")
        page.ask("hello")
        page.reload()
        page.wait(lambda: page.shown("assistant") == [Refusing.MESSAGE, "first"])
        page.ask("hello")
        assert page.shown("assistant") == [Refusing.MESSAGE, "first", "again"]


@pytest.mark.long
def test_a_phone_has_room_for_the_name_of_the_model(browser, trained):
    page = Page(browser, trained)
    page.wait(lambda: page.at("model").text == "tiny")
    assert browser.execute_script(
        "const name = document.getElementById('model'); name.textContent = 'GPT-NeoXT-Chat-Base-20B';"
        "return document.documentElement.scrollWidth <= window.innerWidth && name.clientWidth > 100"
    )


class Red:
    """Finds one passage."""

    def search(self, query: str, k: int) -> list[Passage]:
        return [Passage("red", "<b>Title</b>", "colours.txt", "line 2", 0.1, 7)]


@pytest.mark.long
def test_the_page_shows_where_a_reply_is_from(browser, serve, trained):
    with serve(trained.responder, retriever=Retriever(Red(), k=3)) as running:
        page = Page(browser, running)
        page.wait(lambda: page.at("model").text == "tiny")
        page.ask("say it")
        page.ask("hello")
        script = "return [...document.querySelectorAll('.sources li')].map((item) => [item.value, item.textContent])"
        assert browser.execute_script(script) == [[1, "<b>Title</b>, line 2, colours.txt"]]
        page.reload()
        assert browser.execute_script(script) == [[1, "<b>Title</b>, line 2, colours.txt"]]
        assert page.complaints() == []


@pytest.mark.long
def test_the_page_says_when_nothing_could_be_looked_up(browser, serve, trained):
    with serve(trained.responder, retriever=Retriever(Broken(), k=3)) as running:
        page = Page(browser, running)
        page.wait(lambda: page.at("model").text == "tiny")
        page.ask("say it")
        assert page.shown("assistant") == ["日本 nothing"]
        assert page.shown("note") == ["No passages could be looked up."]
