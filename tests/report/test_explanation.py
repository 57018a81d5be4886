"""The page of `explain`: what it holds, and what a browser makes of it (where there is one)."""

from __future__ import annotations

import base64
import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from ntkjax.report.explanation import BLOCK, DomainExample, Explanation, ShownExample, write_explanation

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COUNT = 300
WORDS = ["Add", " the", " 7", "\n", " </script>", " é", " 😀", " total"]


def example(k: int) -> ShownExample:
    rng = np.random.default_rng(k)
    texts = [f"question {k}"] + [WORDS[i] for i in rng.integers(0, len(WORDS), 6)] + ["rare" if k == 17 else "."]
    parts = rng.standard_normal(len(texts))
    parts[1:] += (300 - k - parts[1:].sum()) / len(parts[1:]) if k % 2 else 0
    parts[0] = 0
    learned = np.arange(len(texts)) > 0
    table = parts.sum() * np.array([[0.25, 0.5], [1.0, -0.75]])
    return ShownExample(
        f"pool-{k}", f"source-{k % 3}", f"pool.jsonl:{k + 1}", min(k // 100, 2), float(300 - k), k + 1, texts, learned,
        parts, table, [(k % 2, 0.5)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def content() -> Explanation:
    domain = [
        DomainExample(f"domain-{i}", f"why {i}?", "so", [(f"pool-{i}", i, 0.75, True), ("far", -1, 0.1, False)])
        for i in (0, 1)
    ]
    groups = [("chosen", 100, 100), ("nearly chosen", 100, 100), ("rejected", 100, 5000)]
    return Explanation(
        "Why & how", "A lead.", [("kernel", "loss")], groups, ["What it is."], [example(k) for k in range(COUNT)],
        domain, ["layer 0", "layer 1"], ["q_proj", "v_proj"], 2.0, "Cosine of gradients.",
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(content, tmp_path_factory) -> Path:
    return write_explanation(tmp_path_factory.mktemp("page") / "explain.html", content)


def unpacked(text: str, name: str):
    (data,) = re.findall(rf'<script type="text/plain" id="{name}">([^<]*)</script>', text)
    return json.loads(zlib.decompress(base64.b64decode(data)))


def test_the_page_holds_every_token_and_every_part(content, page):
    text = page.read_text()
    overview = unpacked(text, "overview")
    assert overview["examples"]["id"] == [f"pool-{k}" for k in range(COUNT)]
    assert overview["sources"] == ["source-0", "source-1", "source-2"]
    for k in (0, 17, BLOCK, COUNT - 1):
        shown = content.examples[k]
        joined, lengths, learned, (size, levels), (most, table) = unpacked(text, f"block-{k // BLOCK}")[k % BLOCK]
        assert joined == "".join(shown.texts) and learned == shown.learned.astype(int).tolist()
        units = joined.encode("utf-16-le")  # JavaScript counts units of 16 bits
        cuts = np.cumsum([0, *lengths])
        assert [units[2 * a : 2 * b].decode("utf-16-le") for a, b in itertools.pairwise(cuts)] == list(shown.texts)
        np.testing.assert_allclose(
            np.array(levels) / 127 * size, shown.parts, atol=0.51 / 127 * np.abs(shown.parts).max()
        )
        np.testing.assert_allclose(
            np.array(table) / 999 * most, shown.table, atol=0.51 / 999 * np.abs(shown.table).max()
        )
    for group, mean in enumerate(overview["means"]):
        tables = [e.table for e in content.examples if e.group == group]
        np.testing.assert_allclose(mean, np.mean(tables, axis=0), rtol=1e-5)


def test_the_page_fetches_nothing_and_escapes_its_title(page):
    text = page.read_text()
    assert "<title>Why &amp; how</title>" in text
    assert not re.search(r"https?:|src=|@import|url\(|<link", text)


def test_an_explanation_without_parts(content, tmp_path):
    bare = dataclasses.replace(content.examples[0], parts=None, table=None, near=(), score=None, rank=0)
    path = write_explanation(
        tmp_path / "a.html", dataclasses.replace(content, examples=[bare], layers=[], own=None, no_parts="because")
    )
    overview = unpacked(path.read_text(), "overview")
    assert overview["examples"]["score"] == [None]
    assert overview["noParts"] == "because" and overview["means"] == [None, None, None]
    assert unpacked(path.read_text(), "block-0")[0][3:] == [None, None]


# -- in a browser --

DRIVE = """<script>
(async () => {
  const until = async test => { while (!test()) await new Promise(go => setTimeout(go, 5)); };
  const names = () => [...document.querySelectorAll(".item .name")].map(node => node.textContent);
  const found = {};
  await until(() => document.body.dataset.done);
  found.items = names().length;
  found.first = names()[0];
  found.height = $("list").firstChild.style.height;
  found.parts = [...document.querySelectorAll("#detail .t")].map(node => [node.textContent, node.style.background]);
  found.tabs = [...document.querySelectorAll("nav button")].map(node => node.textContent);
  const ask = async fields => {
    for (const id of ["text", "source", "high"]) $(id).value = fields[id] || "";
    $("sort").value = fields.sort || "high";
    await filter();
    return names();
  };
  found.low = (await ask({ sort: "low" }))[0];
  found.rare = await ask({ text: "RARE" });
  found.source = (await ask({ source: "1", high: "250" }))[0];
  await ask({});
  $("chips").children[0].click();
  await until(() => view[0] === 100);
  found.without = names()[0];
  document.querySelector("#domain-1 a").click();
  await until(() => current === 1 && view.length === 300);
  found.jumped = document.querySelector("#detail h2").textContent;
  found.module = [...document.querySelectorAll("#detail .h")].map(node => node.textContent);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
def test_a_browser_shows_sorts_filters_and_follows_links(content, page, tmp_path):
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text().replace("</body>", DRIVE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    run = subprocess.run(
        [BROWSER, *flags, "--window-size=1300,800", "--virtual-time-budget=60000", "--dump-dom", driven.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (dumped,) = re.findall(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    found = json.loads(html.unescape(dumped))
    assert found["items"] < 40 and found["height"] == f"{88 * COUNT}px"  # those in view alone
    assert found["first"] == "pool-0" and found["low"] == "pool-299"
    assert found["tabs"] == ["Examples", "Domain", "Layers and modules", "What a score means"]
    shown = content.examples[0]
    assert [text for text, _ in found["parts"]] == list(shown.texts[1:])
    for (_, background), part in zip(found["parts"], shown.parts[1:]):
        wanted = "--up" if part > 0 else "--down"
        assert wanted in background or abs(part) < 0.02 * np.abs(shown.parts).max()
    assert found["rare"] == ["pool-17"]
    assert found["source"] == "pool-52" and found["without"] == "pool-100" and found["jumped"] == "pool-1"
    assert found["module"][:2] == ["q_proj+125%", "v_proj\u221225%"]
