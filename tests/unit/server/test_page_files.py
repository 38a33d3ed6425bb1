"""The page's files at the HTTP door: how they are served, and that they refer to nothing else."""

import re
from importlib.resources import files
from pathlib import Path
from urllib.parse import urljoin

import bilm_server.protocols.http
from bilm_server.protocols.http.page_files import page_files

from tests.support.http_doors import opened

FOLDER = Path(str(files(bilm_server.protocols.http))) / "page"
SCRIPT = "/page/page.js"
ALLOWED_URLS = {"http://www.w3.org/2000/svg"}  # a namespace, which nobody asks for


async def test_the_page_needs_neither_a_model_nor_an_entry_in_the_log() -> None:
    async with opened(loaded=False) as it:
        answers = {path: await it.get(path) for path in page_files()}
        assert {answer.status for answer in answers.values()} == {200}
        assert {path: answer.body for path, answer in answers.items()} == {
            "/" if path.name == "index.html" else f"/page/{path.name}": path.read_bytes() for path in FOLDER.iterdir()
        }
        assert it.ended.records == []


async def test_every_file_has_its_type_and_the_policy() -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
    async with opened() as it:
        for path in page_files():
            headers = (await it.get(path)).headers
            assert headers["content-type"] == types[path.rpartition(".")[2]]
            assert headers["cache-control"] == "no-cache"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
            nothing = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
            assert {policy.pop(name) for name in nothing} == {"'none'"}
            assert policy == {
                "script-src": "'self'",
                "style-src": "'self'",
                "connect-src": "'self'",
                "img-src": "'self' data:",
                "require-trusted-types-for": "'script'",
            }


async def test_a_browser_that_has_a_file_gets_no_second_one() -> None:
    async with opened() as it:
        first = await it.get(SCRIPT)
        etag = first.headers["etag"]
        assert re.fullmatch('"[0-9a-f]{32}"', etag)
        assert etag != (await it.get("/")).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = await it.get(SCRIPT, if_none_match=known)
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
            assert "content-security-policy" in again.headers
        for unknown in ('"other"', etag.strip('"'), ""):
            assert (await it.get(SCRIPT, if_none_match=unknown)).body == first.body


async def test_other_methods_and_hosts() -> None:
    async with opened() as it:
        whole = await it.get("/")
        head = await it.ask("HEAD", "/")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.body)) == whole.headers["content-length"]
        refused = await it.ask("POST", "/")
        assert (refused.status, refused.headers["allow"], refused.code) == (405, "GET", "METHOD_NOT_FOUND")
        assert (await it.get("/", host="foreign.example")).status == 421


async def test_what_is_no_file_of_the_page_is_not_found() -> None:
    async with opened() as it:
        for path in (
            "/index.html",
            "/page",
            "/page/",
            "/page/none.js",
            "/page/../page_files.py",
            "/page/%2e%2e/door.py",
        ):
            assert (path, (await it.get(path)).status) == (path, 404)


def test_the_index_refers_to_every_file_and_to_no_other() -> None:
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    found = re.findall(r'(?:href|src)="([^"#]+)"', index)
    assert sorted(found) == sorted(path.removeprefix("/") for path in page_files() if path != "/")


def test_modules_import_files_that_are_there() -> None:
    imported = set()
    for path in FOLDER.glob("*.js"):
        for name in re.findall(r"from '([^']+)'", path.read_text(encoding="utf-8")):
            imported.add(urljoin(f"/page/{path.name}", name))
    assert imported == {path for path in page_files() if path.endswith(".js")} - {SCRIPT}


def test_nothing_comes_from_another_host_or_stands_inline() -> None:
    for path in FOLDER.iterdir():
        content = path.read_text(encoding="utf-8")
        assert set(re.findall(r"""(?:[a-z]+:)?//[^\s"'`]+\.[^\s"'`]+""", content)) <= ALLOWED_URLS, path
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|@import|url\(", content), path
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]*\ssrc=)", index)
