"""The page in Chromium, on a real server with the model that ships: looked at, typed into, clicked, refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bilm_api.constants import Reason
from bilm_server.errors import RefusalError
from bilm_server.protocols.http import names
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse

from tests.support.chromium import Tab, chromium
from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer, serving

pytestmark = pytest.mark.slow

HTTP = ("--http-listen", "127.0.0.1:0")
TOKEN = "a-token-of-sixteen"
WIDTHS = (320, 768, 1280, 1600)
STATUS, PROBLEM = "document.querySelector('#status').textContent", "document.querySelector('#problem').textContent"
DONE = f"{STATUS}.includes('Computed')"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
NEAREST = """
[...document.querySelectorAll('#nearest table')].map((table) =>
  [table.querySelector('caption mark').textContent, [...table.querySelectorAll('tbody tr')].map((row) =>
    [Number(row.cells[0].textContent.replace('−', '-')), Number.parseInt(row.cells[1].textContent, 10),
     row.querySelector('mark').textContent])])
"""
PAIRS = "[...document.querySelectorAll('.pairs tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
ROW_LABELS = "[...document.querySelectorAll('.map tbody th bdi')].map((word) => word.textContent)"
FOCUS = """(() => {
  const at = document.activeElement;
  const shown = at.type === 'radio' ? at.nextElementSibling : at;
  return [at.id || at.name || at.textContent.trim() || at.tagName, getComputedStyle(shown).outlineStyle !== 'none'];
})()"""
# Texts with their contrast, by WCAG 2.2's formula, where it is less than 4.5
FAINT = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, channel) => sum + value * [0.2126, 0.7152, 0.0722][channel], 0);
  const ground = (at) => {
    const found = numbers(getComputedStyle(at).backgroundColor);
    return found[3] === 0 ? ground(at.parentElement) : found;
  };
  const own = (at) => [...at.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.body.querySelectorAll('*')].filter((at) => own(at) && at.checkVisibility()).map((at) => {
    const [one, other] = [light(numbers(getComputedStyle(at).color)), light(ground(at))];
    return [at.textContent, (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)];
  }).filter(([, contrast]) => contrast < 4.5);
})()"""
# What a screen reader has no name for
NAMELESS = """
[...document.querySelectorAll('button, input, select, textarea, [role=region], section')].filter((at) =>
  !(at.labels?.[0]?.textContent.trim() || at.textContent.trim() || at.getAttribute('aria-labelledby')))
  .map((at) => at.outerHTML)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving("--model", "", *HTTP) as server:
        yield server


@pytest.fixture
def tab() -> Iterator[Tab]:
    with chromium() as tab:
        tab.show_as(1280)
        yield tab


def show(tab: Tab, server: LoopServer) -> None:
    tab.navigate(f"http://{server.http.address}/")


def click(tab: Tab, selector: str) -> None:
    tab.evaluate(f"document.querySelector({selector!r}).click()")


def choose(tab: Tab, select: str, value: str) -> None:
    """Choose one of a list, by the list's id."""
    change = f"at.value = {value!r}; at.dispatchEvent(new Event('change'))"
    tab.evaluate(f"{{ const at = document.getElementById({select!r}); {change} }}")


def example(tab: Tab, label: str) -> None:
    tab.when(DONE)
    tab.evaluate(f"{STATUS[: -len('.textContent')]}.textContent = ''")
    tab.evaluate(
        f"[...document.querySelectorAll('.examples button')].find((at) => at.textContent === {label!r}).click()"
    )
    tab.when(DONE)


def embed(tab: Tab, text: str, until: str = DONE) -> None:
    """Type a text over what is there, and send it."""
    for box in ("status", "problem"):
        tab.evaluate(f"document.querySelector('#{box}').textContent = ''")
    tab.evaluate("document.querySelector('#text').select(); document.querySelector('#text').focus()")
    tab.type(text)
    tab.press("Enter", control=True)
    tab.when(until)


def test_the_first_look(server: LoopServer, tab: Tab) -> None:
    show(tab, server)
    tab.when(DONE)
    status = tab.evaluate(STATUS)
    assert f"Model {server.model.name}, version {server.model.version}." in status
    assert "5 sentences, 55 tokens" in status
    nearest = tab.evaluate(NEAREST)
    assert [word for word, _ in nearest] == ["bank"] * 5
    # A bank with money is nearest to the other one, a bank of a river to the other two
    assert [rows[0][1:] for _, rows in nearest[:2]] == [[2, "bank"], [1, "bank"]]
    assert {(place, word) for _, rows in nearest[2:] for _, place, word in rows[:2]} == {(n, "bank") for n in (3, 4, 5)}
    assert all(cosine > 0.9 for _, rows in nearest for cosine, *_ in rows[:1])
    assert len(tab.evaluate(ROW_LABELS)) == 55
    assert tab.evaluate("document.querySelectorAll('.map tbody td').length") == 55 * 55
    assert tab.evaluate(NAMELESS) == []
    assert tab.problems == []


@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        ("document.body.setAttribute('style', 'color: red')", "style-src-attr"),
        ("fetch('http://127.0.0.1:1/').catch(() => {})", "connect-src"),
        ("try { document.body.innerHTML = '<b>bold</b>'; } catch {}", "require-trusted-types-for"),
        ("new Image().src = 'http://127.0.0.1:1/'", "img-src"),
    ],
)
def test_the_policy_is_in_force(server: LoopServer, tab: Tab, attempt: str, directive: str) -> None:
    show(tab, server)
    violated = "document.addEventListener('securitypolicyviolation', (event) => resolve(event.effectiveDirective))"
    assert tab.evaluate(f"new Promise((resolve) => {{ {violated}; {attempt}; }})") == directive


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_is_readable(server: LoopServer, tab: Tab, dark: bool) -> None:
    for width in WIDTHS:
        tab.show_as(width, dark=dark)
        show(tab, server)
        tab.when(DONE)
        assert (width, tab.evaluate(OVERFLOW)) == (width, 0)
        assert tab.evaluate(FAINT) == []
    grounds = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (grounds == "rgb(20, 23, 27)") is dark
    assert tab.problems == []


def test_a_typo_moves_a_word_little(server: LoopServer, tab: Tab) -> None:
    show(tab, server)
    example(tab, "a typo")
    nearest = tab.evaluate(NEAREST)
    assert nearest[0][0] == "patietns"
    assert nearest[0][1][0][1:] == [2, "patients"]
    rows = tab.evaluate(PAIRS)
    [changed] = [row for row in rows if row[0] != row[1]]
    assert changed[:2] == ["patietns", "patients"]
    characters, middle, top, _ = map(float, changed[2:])
    assert characters < middle < top
    assert middle > 0.9
    assert tab.problems == []


def test_choosing_layers_words_and_sentences(server: LoopServer, tab: Tab) -> None:
    show(tab, server)
    example(tab, "play")
    cosines = []
    for layer in ("0", "1", "2", "average"):
        click(tab, f"input[name=layer][value='{layer}']")
        cosines.append([rows[0][0] for _, rows in tab.evaluate(NEAREST)])
    assert cosines[0] == [1.0] * 5  # characters alone know no sentence
    assert len({tuple(each) for each in cosines}) == 4
    click(tab, "input[name=word][value='1:0']")
    assert [word for word, _ in tab.evaluate(NEAREST)] == ["Critics"]
    assert tab.evaluate("document.querySelector('.map tr.chosen bdi').textContent") == "Critics"
    tab.evaluate("document.querySelectorAll('.map tbody tr')[2].cells[1].click()")  # the first sentence's third word
    assert tab.evaluate(NEAREST)[0][0] == tab.evaluate(ROW_LABELS)[2] == "the"
    assert tab.evaluate("document.querySelector('input[name=word]:checked').value") == "0:2"
    choose(tab, "second", "0")
    assert {cosine for row in tab.evaluate(PAIRS) for cosine in row[2:]} == {"1.00"}  # a sentence beside itself
    assert tab.problems == []


def test_what_people_type(server: LoopServer, tab: Tab) -> None:
    show(tab, server)
    tab.when(DONE)
    scripts = tab.evaluate("document.scripts.length")
    markup = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    embed(tab, f"\n  \n{markup}\nשלום עולם\n😀 👩‍👩‍👧 e\u0301\u202e\n{'x' * 10_000}\n{'long words ' * 900}\n\u200b")
    assert "6 sentences" in tab.evaluate(STATUS)  # lines of white space aren't any
    assert tab.evaluate("[document.scripts.length, document.images.length]") == [scripts, 0]
    assert tab.evaluate("document.querySelectorAll('#tokens input').length") == 400
    assert "The first 400 of" in tab.evaluate("document.querySelector('#tokens').textContent")
    assert "The first 64 of" in tab.evaluate("document.querySelector('#map').textContent")
    assert len(tab.evaluate(ROW_LABELS)) == 64
    for width in WIDTHS:
        tab.show_as(width)
        assert (width, tab.evaluate(OVERFLOW)) == (width, 0)
    embed(tab, "alone")
    assert "There is no other sentence." in tab.evaluate("document.querySelector('#nearest').textContent")
    assert tab.evaluate("document.querySelector('#pairs').textContent") == "There are no two sentences."
    embed(tab, "\n".join(f"number {i}" for i in range(60)))
    assert tab.evaluate(STATUS).endswith("Only the first 50 of 60 sentences were sent.")
    embed(tab, " ", PROBLEM)
    assert tab.evaluate(PROBLEM) == "There is no sentence: type one."
    assert tab.problems == []


def test_refusals_in_the_servers_words(server: LoopServer, tab: Tab) -> None:
    show(tab, server)
    tab.when(DONE)
    embed(tab, f"fine\n{'w ' * 40_000}")
    assert "1 refused" in tab.evaluate(STATUS)
    assert "(SENTENCE_TOO_LONG)" in tab.evaluate("document.querySelector('#tokens .problem').textContent")
    embed(tab, "\n".join(["w " * 1000] * 40), PROBLEM)
    assert tab.evaluate(PROBLEM).startswith("Refused (TOO_MANY_TOKENS): 17000 tokens and more are more than 16384.")
    assert tab.evaluate("document.querySelector('#results').getAttribute('aria-busy')") is None
    embed(tab, "fine again")
    assert tab.evaluate(PROBLEM) == ""


def test_the_keyboard_suffices(server: LoopServer, tab: Tab) -> None:
    show(tab, server)
    tab.when(DONE)
    path: list[str] = []
    while not path or path[-1] != "text":
        path.append(_tab(tab))
    assert path == ["Skip to the results", "bank", "play", "a typo", "text"]
    tab.evaluate("document.activeElement.select()")
    tab.type("The cat sat .\nA cat slept .")
    tab.press("Enter", control=True)
    tab.when(f"{STATUS}.includes('2 sentences')")
    assert [_tab(tab) for _ in range(4)] == ["Access token", "Embed", "layer", "word"]
    assert tab.evaluate(NEAREST)[0][0] == "The"
    tab.press("ArrowRight")
    assert [word for word, _ in tab.evaluate(NEAREST)] == ["cat", "cat"]
    assert [_tab(tab) for _ in range(2)] == ["first", "second"]
    assert tab.evaluate("document.querySelector('#map .scroll').tabIndex") == 0
    assert tab.problems == []


def _tab(tab: Tab) -> str:
    """Go to the next element; return its name, after making sure that one sees where the focus is."""
    tab.press("Tab")
    name, outlined = tab.evaluate(FOCUS)
    assert outlined, name
    return str(name)


def test_a_token_is_asked_for_and_kept_in_memory_only(tab: Tab, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"team-a {TOKEN}\n")
    file.chmod(0o600)
    with serving(*HTTP, "--token-file", str(file)) as server:
        show(tab, server)
        tab.when(f"{PROBLEM}.includes('UNAUTHENTICATED')")
        assert tab.evaluate("document.querySelector('#access').open")
        assert not tab.evaluate("document.querySelector('#results').checkVisibility()")  # there is nothing to see
        tab.evaluate("document.querySelector('#token').focus()")
        tab.type(TOKEN)
        tab.press("Enter", "\r")
        tab.when(DONE)
        assert tab.evaluate(PROBLEM) == ""
        assert tab.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        show(tab, server)
        tab.when(f"{PROBLEM}.includes('UNAUTHENTICATED')")


def test_a_model_is_chosen(tab: Tab) -> None:
    models = ("--model", "one=random:tiny", "--model", "other=random:small")
    with ProcessServer(*models, *HTTP) as server:
        tab.navigate(f"http://{server.http_address}/")
        tab.when(f"{STATUS}.includes('Model one, version')")
        choose(tab, "model", "other")
        tab.when(f"{STATUS}.includes('Model other, version')")
        assert tab.evaluate("document.querySelector('#facts dd').textContent") == "other"
        assert tab.problems == []


def test_several_models_one_of_which_is_gone(tab: Tab) -> None:
    async def models(_: HttpRequest) -> HttpResponse:
        return HttpResponse(b'{"object": "list", "data": [{"id": "random-tiny"}, {"id": "gone", "version": "7"}]}')

    with serving(*HTTP) as server:
        server.http.app.open({names.MODELS: models})
        show(tab, server)
        tab.when(DONE)
        assert tab.evaluate("document.querySelector('#model-choice').checkVisibility()")
        choose(tab, "model", "gone")
        tab.when(PROBLEM)
        assert "(MODEL_NOT_FOUND)" in tab.evaluate(PROBLEM)
        assert tab.evaluate("document.querySelector('#facts').textContent") == "NamegoneVersion7"


def test_a_model_that_is_being_loaded_is_waited_for(tab: Tab) -> None:
    asked: list[Any] = []

    with serving(*HTTP) as server:
        described = b'{"object": "list", "data": [{"id": "%b"}]}' % server.model.name.encode()

        async def models(request: HttpRequest) -> HttpResponse:
            asked.append(request)
            if len(asked) < 3:
                raise RefusalError(Reason.MODEL_LOADING, "the model is being loaded; try again", 50)
            return HttpResponse(described)

        server.http.app.open({names.MODELS: models})
        show(tab, server)
        tab.when(DONE)
        assert len(asked) == 3
        assert tab.evaluate(PROBLEM) == ""
