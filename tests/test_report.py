"""The report: all that a run's folder holds, whatever its state, in one file that is safe."""

from __future__ import annotations

import copy
import html.parser
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dbae.errors import UserError
from dbae.evaluation import published
from dbae.report import write_report
from dbae.report.plots import moving_average, reduced
from dbae.report.text import figure, share

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dbae_report.py"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECTIONS = (
    "training", "reconstruction", "classification", "regression", "disentanglement",
    "interpolation", "manipulation", "latents", "configuration",
)  # fmt: skip
HOSTILE = (
    '</script><script>alert(1)</script><img src="http://evil.test/a.png" onerror=alert(2)>'
    "'\"><svg onload=alert(3)> {{ 7 * 7 }} $\\frac{1}{0}$ \u202eevil\udc80\x00\x1b" + "w" * 400
)


# A run's folder -------------------------------------------------------------------------------


def estimated(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def protocol(step: int, **more: Any) -> dict[str, Any]:
    return {
        "dataset": {"dataset": "folder", "split": "test", "path": "faces.zip", "fingerprint": "f0"},
        "checkpoint": f"ema_0.9999_{step:06d}.pt", "checkpoint_sha256": "ab" * 32, "ema": 0.9999,
        "seed": 3, "latent": "deterministic", "seen_in_training": False, "sampler": "euler",
        "steps": 20, "churn": 0.0, "guidance": 1.0, "nfe": 20,
        "model": {"image_size": 32, "latent_dim": 8, "stochastic": False, "schedule": "vp"},
        **more,
    }  # fmt: skip


def score(mean: float, n: int = 12) -> dict[str, float | int]:
    return {"mean": mean, "stderr": mean / 10, "n": n}


def reconstruction(step: int, errors: list[float], **more: Any) -> dict[str, Any]:
    baseline = {"mse": score(0.5), "ssim": score(0.1), "lpips": None, "seed": 0, "note": "fitted"}
    return {
        "kind": "reconstruction", "mse": score(float(np.mean(errors))), "ssim": score(0.7),
        "lpips": None, "lpips_reason": "the weights are not there",
        "protocol": protocol(step, **more),
        "baselines": {
            "x_T": {"label": "x_T", "mse": score(0.3), "ssim": score(0.2), "nfe": 0, "seed": 3},
            "pca": {"label": "PCA, 8 components", **baseline},
            "mean_image": {"label": "mean image", "reason": "no training images"},
        },
        "per_image": {
            "index": list(range(12)), "name": [f"face {i}.png" for i in range(12)],
            "mse": errors, "ssim": [0.05 * i for i in range(12)],
        },
    }  # fmt: skip


def probe(kind: str) -> dict[str, Any]:
    first, second = {"classification": ("ap", "accuracy"), "regression": ("pearson_r", "mse")}[kind]
    base = "base_rate" if kind == "classification" else "variance"
    attributes = [
        {"name": f"Some_Attribute_{i}", base: 0.3, first: estimated(0.9 - 0.02 * i),
         second: estimated(0.8)}
        for i in range(40)
    ]  # fmt: skip
    common = {"n_train": 600, "n_valid": 70, "n_test": 81, "dim": 8, second: estimated(0.8)}
    paper = "paper" if kind == "classification" else "paper, last epoch"
    history = [{"epoch": e, "train_loss": 1 / e, f"valid_{first}": 0.4} for e in (1, 2, 3)]
    rows = [
        {"method": "DBAE", "probe": paper, first: estimated(0.61), "best_epoch": 2,
         "history": history, "attributes": attributes, **common},
        {"method": "DBAE", "probe": "converged", first: estimated(0.65), "attributes": attributes,
         **common},
        {"method": "raw pixels", "probe": "converged", first: estimated(0.55),
         "note": "3072 numbers", "attributes": attributes, **common},
    ]  # fmt: skip
    names = (first,) if kind == "classification" else (first, second)
    return {
        "kind": kind, "protocol": protocol(20), "rows": rows,
        "base_rate": {first: 0.3, second: 0.7} if kind == "classification" else {second: 0.7},
        "disentanglement": {"tad": 0.125, "captured": 2, "considered": 9, "definition": "a sum"},
        "left_out": [{"name": "Bald", "reason": "is no for all 81 test images"}],
        "published": published.probe_rows(*names),
    }  # fmt: skip


LATENTS = {
    "kind": "latents", "protocol": protocol(20), "n": 500, "latent_dim": 8,
    "z": {"mean": [0.0] * 8, "std": [1.0] * 7 + [0.001], "spectrum": [2.0, 1, 1, 1, 1, 0.5, 0.1, 0],
          "dead": [7], "effective_rank": 5.5},
    "neighbours": {"file": "neighbours.png", "queries": ["a"], "neighbours": [["b", "c"]]},
}  # fmt: skip
INTERPOLATION = {
    "kind": "interpolation", "protocol": protocol(20, mode="linear", points=11),
    "images": ["img1.png", "img2.png"],
    "smoothness": {"path_length": 0.4, "direct": 0.3, "straightness": 0.75, "largest_step": 1.2,
                   "unit": "RMS of pixels"},
}  # fmt: skip
MANIPULATION = {
    "kind": "manipulation", "protocol": protocol(20),
    "edits": [
        {"image": "img3.png", "attribute": "Male", "scales": [-0.3, -0.15, 0, 0.15, 0.3],
         "file": "img3_manipulated_x0.png", "x_T_file": "img3_manipulated_xT.png",
         "probability": [0.1, 0.3, 0.5, 0.7, 0.995]}
    ],
    "measured": {
        "n": 64,
        "rows": [{"attribute": "Male", "scale": 0.3, "target": estimated(1.5), "others": None,
                  "flipped": estimated(0.9), "flipped_before": estimated(0.5),
                  "orthogonal": estimated(0.2), "pixel_mse": estimated(0.01)}],
    },
}  # fmt: skip
CONFIG = {
    "model": {"image_size": 32, "latent_dim": 8, "stochastic": False, "schedule": "vp",
              "end_data": 0.5},
    "train": {"dataset": "folder", "max_steps": 5000, "batch_size": 16, "lr": 0.001,
              "ema_rate": 0.9999},
    "data": {"dataset": "folder", "split": "train", "n": 9965, "path": "faces.zip"},
    "environment": {"world_size": 1, "device": "cpu"},
    "a later version's key": {"x": [1, 2]},
}  # fmt: skip


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) if not isinstance(content, str) else content
    path.write_text(text, encoding="utf-8")


def picture(path: Path, width: int, height: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def put_reconstruction(folder: Path, step: int, **more: Any) -> None:
    """Twelve pairs in two files; the error grows with the image's number."""
    folder.mkdir(parents=True)
    real = np.full((12, 32, 32, 3), 100, np.uint8)
    fake = real + np.arange(12, dtype=np.uint8)[:, None, None, None]
    for batch, rows in enumerate((slice(0, 8), slice(8, 12))):
        np.savez(folder / f"0_real_sample_{batch}.npz", samples=real[rows])
        np.savez(folder / f"0_fake_sample_{batch}.npz", samples=fake[rows])
    errors = [(i / 255) ** 2 for i in range(12)]
    put(folder / "metrics.json", reconstruction(step, errors, **more))
    picture(folder / "comparison.png", 410, 104)


def put_progress(path: Path, rows: int) -> None:
    head = "step,images,loss,xs_mse,grad_norm,grad_norm_encoder,z_norm,z_std,z_dead,replaced_images"
    lines = [
        f"{50 * i},{800 * i},{1 / i},{0.1 / i},{2 / i},{1 / i},2.5,0.3,0,0,{20 + i % 3},0.5"
        for i in range(1, rows + 1)
    ]
    put(path, "\n".join([f"{head},images_per_s,seconds", *lines]) + "\n")


def make_run(root: Path) -> Path:
    put(root / "config.json", CONFIG)
    put_progress(root / "progress.csv", 1000)
    for step in (500, 1000, 1500):
        picture(root / f"samples/{step:06d}.png", 274, 104)
    results = root / "sample_20"
    put_reconstruction(results / "euler_7.0_20_w=1.0_churn=0.0", 20)
    put_reconstruction(results / "heun_7.0_10_w=1.0_churn=0.33", 20, sampler="heun", churn=0.33)
    put_reconstruction(root / "sample_9/euler_7.0_20_w=1.0_churn=0.0", 9)
    put(results / "latents/faces_test/latents.json", LATENTS)
    picture(results / "latents/faces_test/neighbours.png", 206, 70)
    put(results / "downstream_inference/multitask_ema/metrics.json", probe("classification"))
    put(results / "downstream_inference/regression_ema/metrics.json", probe("regression"))
    put(results / "interpolation_heun/metrics.json", INTERPOLATION)
    for name in ("x0", "xT"):
        picture(results / f"interpolation_heun/interpolation_{name}.png", 376, 36)
        picture(results / f"manipulation_heun/img3_manipulated_{name}.png", 172, 36)
    put(results / "manipulation_heun/metrics.json", MANIPULATION)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result of every kind; read only."""
    return make_run(tmp_path_factory.mktemp("runs") / "folder32_32_8d_false_vp")


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def hostile(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same results with every name and text replaced by one that means harm; the report."""
    folder = tmp_path_factory.mktemp("hostile") / "<b>run&amp;"
    shutil.copytree(run, folder)
    for path in (folder / "config.json", *result_files(folder)):
        put(path, poisoned(json.loads(path.read_text())))
    # as a file system allows it: not UTF-8 either
    os.rename(folder / "sample_20", os.fsencode(folder) + b"/sample_<i>\xff")
    return write_report(folder)


def result_files(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("metrics.json"), *folder.rglob("latents.json")])


def poisoned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return HOSTILE if isinstance(value, str) and key not in ("kind", "file", "x_T_file") else value


# Reading a page -------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """Checks that elements nest, and collects them."""

    VOID = frozenset("meta img br wbr link hr input".split())
    INLINE = frozenset("a b bdi code i small strong wbr".split())
    EMPTY_SVG = frozenset("path use rect line circle image polygon polyline".split())

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, dict(attributes)))
        self.text += "" if tag in self.INLINE else " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self.EMPTY_SVG, f"<{tag}/> does not close in HTML"
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def outline(page: Path) -> Outline:
    return Outline(page.read_text(encoding="utf-8"))


def words(page: Path) -> str:
    """The page's text, of which line ends and spaces do not matter."""
    return " ".join(outline(page).text.split())


def section_of(page: Path, name: str) -> str:
    found = re.search(rf'<section id="{name}".*?</section>', page.read_text(), re.DOTALL)
    assert found
    return found[0]


# What a full run shows ------------------------------------------------------------------------


def test_the_head_says_what_the_run_is_and_its_best_figures_with_links(page: Path) -> None:
    text = words(page)
    assert "folder32_32_8d_false_vp" in text
    for fact in (
        "split train of faces.zip, 9,965 images", "32×32 pixels", "deterministic encoder (DBAE-d)",
        "vp, σ_T 0.5", "50,000 of 5,000, 800,000 images", "ema_0.9999_000020.pt (EMA 0.9999)",
    ):  # fmt: skip
        assert fact in text
    summary = re.search(r'<p class="summary">(.*?)</p>', page.read_text(), re.DOTALL)
    assert summary
    assert re.findall(r'href="#(\w+)"', summary[1]) == [
        "reconstruction", "classification", "regression", "latents"
    ]  # fmt: skip
    for figure_text in ("MSE 0.0", "0.650 [0.600, 0.700]", "0.300 (knowing nothing)", "5.5"):
        assert figure_text in summary[1]


def test_every_section_is_there_and_the_navigation_leads_to_it(page: Path) -> None:
    found = outline(page)
    assert [s["id"] for s in found.all("section")] == list(SECTIONS)
    links = {a["href"] for a in found.all("a")}
    assert {f"#{name}" for name in SECTIONS} <= links
    assert len(found.all("h1")) == 1
    assert not re.search(r'class="(absent|problem)"', page.read_text())


def test_reconstruction_rows_have_their_n_protocol_and_what_they_compare_with(page: Path) -> None:
    section = section_of(page, "reconstruction")
    table = section[: section.index("</table>")]
    text = " ".join(Outline(table[table.index("<table") :] + "</table>").text.split())
    assert "Reconstruction of 12 images, split test of faces.zip (not trained on" in text
    assert "Heun, 20 steps, SDE churn 0.33" in text
    for row in ("x_T 0.30000 ± 0.03000", "PCA, 8 components 0.50000 ± 0.05000", "mean image —"):
        assert row in text
    assert "LPIPS not computed: the weights are not there." in section
    assert "mean image: no training images." in section
    published_part = section[section.rindex("<aside") :]
    assert "Published, not measured here" in published_part and "DBAE-d" in published_part
    assert "DBAE-d" not in table


def test_best_and_worst_images_are_those_of_the_arrays(page: Path) -> None:
    section = section_of(page, "reconstruction")
    best, median, worst = re.findall(r"<div class=\"pictures\">(.*?)</figure>", section, re.DOTALL)[
        :3
    ]
    assert re.findall(r"face (\d+)\.png", best)[::2] == ["0", "1", "2", "3"]
    assert re.findall(r"face (\d+)\.png", median)[::2] == ["4", "5", "6", "7"]
    assert re.findall(r"face (\d+)\.png", worst)[::2] == ["11", "10", "9", "8"]
    assert f"{(11 / 255) ** 2:.5f}" in worst


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda p: np.savez(p, samples=np.zeros((4, 32, 32, 3), np.uint8)), "do not belong"),
        (lambda p: np.savez(p, samples=np.zeros((5, 32, 32, 3), np.uint8)), "12 originals and 13"),
        (lambda p: np.savez(p, samples=np.zeros((4, 16, 16, 3), np.uint8)), "differ in size"),
        (lambda p: np.savez(p, samples=np.zeros((4, 32, 32, 3))), "expected uint8 images"),
        (lambda p: np.savez(p, other=np.zeros(4)), "is not a readable file of images"),
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), "is not a readable file of images"),
        (lambda p: p.unlink(), "has no partner 0_fake_sample_1.npz"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_the_scores_are_not_shown(
    spoil: Callable[[Path], Any], problem: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sample_9/euler"
    put_reconstruction(folder, 9)
    spoil(folder / "0_fake_sample_1.npz")
    page = write_report(tmp_path)
    assert re.search(rf"sample_9/euler/metrics.json: .{{0,120}}{problem}", words(page))
    assert str(tmp_path) not in page.read_text()
    assert "Best: original" not in words(page)


def test_older_checkpoints_are_folded_below_the_newest(page: Path) -> None:
    section = section_of(page, "reconstruction")
    assert section.index("<h3>Checkpoint: step 20") < section.index("<summary>Checkpoint: step 9")
    opened = section.count("<details", 0, section.index("Checkpoint: step 20"))
    assert opened == 0


def test_probes_show_intervals_base_rate_notes_and_every_attribute(page: Path) -> None:
    for kind in ("classification", "regression"):
        section = section_of(page, kind)
        text = " ".join(Outline(section).text.split())
        assert "0.650 [0.600, 0.700]" in text
        assert "raw pixels, converged: 3072 numbers." in text
        assert "Left out: Bald (is no for all 81 test images)." in text
        assert "knowing nothing" in text and "n = 81 test images" in text
        bars = section[section.index('<table class="bars">') :]
        names = re.findall(r'scope="row">Some_<wbr>Attribute_<wbr>(\d+)<', bars)[:40]
        assert names == [str(i) for i in range(40)]  # best first
        assert "β-TCVAE" in section[section.index("<aside") :]
    assert "TAD 0.125 Attributes captured 2 of 9" in words(page)


def test_edits_and_latents_show_their_figures(page: Path) -> None:
    text = words(page)
    assert "img1.png and img2.png 0.4000 0.3000 0.7500 1.2000" in text
    assert "-0.3 -0.15 0 +0.15 +0.3" in text
    assert "10 % 30 % 50 % 70 % 99.5 %" in text
    assert "Male +0.3 1.500 [1.450, 1.550] — 50 % [45 %, 55 %] 90 % [85 %, 95 %]" in text
    assert "Dead dimensions 1 (of index 7)" in text


def test_the_configuration_and_every_whole_protocol_are_on_the_page(page: Path, run: Path) -> None:
    text = words(page)
    assert "train.max_steps 5000" in text
    for path in result_files(run):
        assert f"Protocol of {path.relative_to(run).as_posix()}" in text
    assert text.count("checkpoint_sha256 " + "ab" * 32) == len(result_files(run))


def test_without_config_results_anywhere_below_are_found_by_their_kind(
    run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results of a shipped model"
    shutil.copytree(
        run / "sample_20/downstream_inference/multitask_ema", folder / "some where/probe"
    )
    put(folder / "other/deep/er/metrics.json", INTERPOLATION)
    text = words(write_report(folder))
    assert "a linear map of z reaches a mean AP of 0.650" in text
    assert "(step 20)" in text  # from the checkpoint's name
    assert "8 numbers, deterministic encoder" in text  # from the protocol
    assert "Smoothness of the way between img1.png and img2.png" in text


# Absent and broken parts ----------------------------------------------------------------------


def test_absent_parts_name_the_command_that_makes_them(tmp_path: Path) -> None:
    put(tmp_path / "config.json", CONFIG)
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text = words(page)
    for command in (
        "bash train_dbae.sh folder vp false",
        "bash recon_dbae.sh folder vp CKPT 0 1 test 7 euler 100 false",
        "bash infer_class_dbae.sh folder vp CKPT false",
        "bash infer_reg_dbae.sh folder vp CKPT false",
        "bash interpol_dbae.sh folder vp CKPT 0.33 1 train 7 heun 167 false",
        "bash manipul_dbae.sh folder vp CKPT 0.33 1 train 7 heun 167 false",
        "python3 scripts/dbae_encode.py --checkpoint CKPT --dataset folder",
    ):
        assert f"To make it: {command}" in text
    assert "Nothing is evaluated yet" in text


def test_commands_keep_their_words_where_nothing_tells_them(tmp_path: Path) -> None:
    put_progress(tmp_path / "progress.csv", 2)
    assert "bash infer_class_dbae.sh DATASET SCHEDULE CKPT STO" in words(write_report(tmp_path))


def test_broken_files_become_lines_that_name_file_and_problem(tmp_path: Path) -> None:
    put(tmp_path / "config.json", "{")
    put(
        tmp_path / "progress.csv",
        "step,loss\n10,0.5\n20,none\n30\n40,nan\n50,0.25\nnan,1\n",
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/000010.png").write_bytes(b"not a picture")
    put(tmp_path / "sample_1/a/metrics.json", "[1, 2]")
    put(tmp_path / "sample_1/b/metrics.json", {"kind": "fid", "value": 3})
    put(tmp_path / "sample_1/c/metrics.json", {"some": "thing"})
    put(tmp_path / "sample_1/d/metrics.json", {"kind": "classification", "rows": [{"ap": 1}]})
    put(tmp_path / "sample_1/e/metrics.json", {"mse": score(0.1), "per_image": {"mse": [0.1]}})
    put(tmp_path / "sample_1/f/metrics.json", "[" * 100_000)
    page = write_report(tmp_path)
    text = words(page)
    for line in (
        "config.json: is not valid JSON",
        "progress.csv: 3 of 6 rows are not readable",
        "progress.csv: has values that are not finite: loss (1 rows)",
        "progress.csv: has no values of xs_mse",
        "samples/000010.png: cannot be shown (cannot identify image file",
        "sample_1/a/metrics.json: does not hold a JSON object",
        "sample_1/b/metrics.json: is of kind 'fid'",
        "sample_1/c/metrics.json: lacks kind",
        "sample_1/d/metrics.json: rows lacks method",
        "sample_1/e/metrics.json: lacks protocol, baselines",
        "sample_1/e/metrics.json: the comparison cannot be shown (comparison.png is no file",
        "sample_1/f/metrics.json: is not valid JSON",
    ):
        assert line in text
    assert "DBAE 0.10000 ± 0.01000" in text  # what can be shown is shown


def mutations(content: dict[str, Any], seed: int, count: int) -> Iterator[Any]:
    """Copies with one value anywhere taken out or replaced by something of another kind."""
    chooser = random.Random(seed)
    places: list[tuple[Any, ...]] = []

    def walk(value: Any, place: tuple[Any, ...]) -> None:
        places.extend([place] if place else [])
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            if isinstance(child, dict | list):
                walk(child, (*place, key))
            else:
                places.append((*place, key))

    walk(content, ())
    for _ in range(count):
        changed = copy.deepcopy(content)
        *way, last = chooser.choice([p for p in places if p != ("kind",)])
        parent = changed
        for key in way:
            parent = parent[key]
        values = [None, "text", -1, 1e308, float("nan"), [], {}, True, [[]], 10**400, "../x.png"]
        choice = chooser.choice([*values, "take out"])
        if choice == "take out":
            del parent[last]
        else:
            parent[last] = choice
        yield changed


def smaller(content: dict[str, Any]) -> dict[str, Any]:
    """The same with two attributes a row."""
    content = copy.deepcopy(content)
    for row in content.get("rows", []):
        row["attributes"] = row["attributes"][:2]
    return content


def test_no_damage_to_a_file_breaks_the_report(tmp_path: Path) -> None:
    errors = [(i / 255) ** 2 for i in range(12)]
    contents = (
        reconstruction(20, errors), smaller(probe("classification")),
        smaller(probe("regression")), LATENTS, INTERPOLATION, MANIPULATION,
    )  # fmt: skip
    for i, content in enumerate(contents):
        for j, changed in enumerate(mutations(content, seed=i, count=12)):
            put(tmp_path / f"sample_{j}/{i}/metrics.json", changed)
    put(tmp_path / "config.json", next(mutations(CONFIG, seed=9, count=1)))
    outline(write_report(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: path.mkdir(), "holds nothing to report"),
        (lambda path: put(path / "run one/config.json", CONFIG), "holds the runs run one"),
    ],
)
def test_a_folder_without_a_run_is_one_line(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "it")
    with pytest.raises(UserError, match=message) as caught:
        write_report(tmp_path / "it")
    assert "\n" not in str(caught.value)


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    put_progress(tmp_path / "progress.csv", 2)
    with pytest.raises(UserError, match="is a folder"):
        write_report(tmp_path, tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path, tmp_path / "absent" / "report.html")


# Safety ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_the_page_is_whole_and_refers_to_nothing_outside(
    which: str, request: pytest.FixtureRequest
) -> None:
    page: Path = request.getfixturevalue(which)
    found = outline(page)
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            allowed = ("#", "data:image/png;base64,", "https://arxiv.org/abs/2405.17111")
            assert value is None or value.startswith(allowed), value
        assert "url(" not in (attributes.get("style") or "")
    assert len(found.all("style")) == 1
    assert {"script", "iframe", "object", "embed", "link", "base", "form"}.isdisjoint(
        tag for tag, _ in found.elements
    )
    text = page.read_text(encoding="utf-8")
    assert "url(http" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    uses = {attributes["href"] for attributes in found.all("use")}
    assert uses <= {f"#{name}" for name in ids}
    for image in found.all("img"):
        assert image["alt"]


def test_hostile_names_are_shown_as_text_and_do_nothing(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    assert "<b>run&amp;amp;" not in text and "&lt;b&gt;run&amp;amp;" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7 * 7 }}" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", text)


@pytest.mark.parametrize("way", ["../secret.png", "link.png", "/etc/passwd", "x\x00.png"])
def test_a_file_outside_of_the_run_is_not_shown(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    picture(tmp_path / "secret.png", 50, 50)
    put(folder / "latents.json", {**LATENTS, "neighbours": {**LATENTS["neighbours"], "file": way}})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    page = write_report(folder)
    assert "data:image" not in page.read_text()
    assert "latents.json: neighbours cannot be shown (" in words(page)


def test_the_newest_grid_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (990_000, 1_000_000):
        picture(tmp_path / f"samples/{step:06d}.png", 30, 30)
    text = words(write_report(tmp_path))
    assert text.index("at step 1000000") < text.index("1 of 1 earlier grids")


def test_a_huge_picture_and_many_pictures_keep_the_page_small(tmp_path: Path) -> None:
    picture(tmp_path / "samples/000001.png", 2000, 1500)
    for i in range(8):
        folder = tmp_path / f"sample_{i}/interpolation_x"
        put(folder / "metrics.json", INTERPOLATION)
        picture(folder / "interpolation_x0.png", 700, 500, seed=i)
        shutil.copy(folder / "interpolation_x0.png", folder / "interpolation_xT.png")
    page = write_report(tmp_path)
    assert page.stat().st_size < 8_000_000
    assert len(outline(page).all("img")) == 17


# The same bytes, drawings, the command ----------------------------------------------------------


def test_the_same_files_give_the_same_bytes_wherever_they_lie(
    run: Path, page: Path, tmp_path: Path
) -> None:
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "TZ": "Asia/Tokyo"}
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 20\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_bytes() == page.read_bytes()


def test_the_command_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_figures_keep_the_digits_that_their_size_calls_for() -> None:
    for (value, low, high), text in (
        ((0.5, 0.00869, 1.2345), "0.500 [0.009, 1.234]"),
        ((0.00569, 0.00474, 0.00664), "0.00569 [0.00474, 0.00664]"),
        ((0.001, None, None), "0.00100"),
        ((None, None, None), "—"),
    ):
        assert figure({"value": value, "low": low, "high": high}).striptags() == text
    shares = [share(x).replace("\N{NO-BREAK SPACE}", " ") for x in (0, 1e-6, 0.004, 0.5, 0.9999, 1)]
    assert shares == ["0 %", "<0.1 %", "0.4 %", "50 %", ">99.9 %", "100 %"]


def test_a_long_series_keeps_its_peaks_when_it_is_reduced() -> None:
    y = np.zeros(100_000)
    y[[0, 61_234, 99_999]] = (-3, 7, 5)
    x = np.arange(len(y)) * 10.0
    kept_x, kept_y = reduced(x, y)
    assert len(kept_y) <= 800
    assert dict(zip(kept_x, kept_y, strict=True))[612_340] == 7
    assert kept_y[0] == -3 and 5 in kept_y
    assert (np.diff(kept_x) > 0).all()


def test_the_moving_average_shrinks_its_window_at_the_ends() -> None:
    found = moving_average(np.array([0.0, 3, 6, 9, 30]), 3)
    assert found.tolist() == [1.5, 3, 6, 15, 19.5]


# In a browser -----------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"
)
# What the page under test reports about itself: its frame's width, and what sticks out of it.
WRAPPER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" src="{page}" style="border:0;width:{width}px;height:700px"></iframe>
<pre id="found"></pre><script>
frame.onload = () => {{
  const inner = frame.contentDocument, root = inner.documentElement;
  const wide = [...inner.querySelectorAll("body *")].filter((e) => {{
    const box = e.getBoundingClientRect();
    return box.right > {width} + 1 && !e.closest(".scroll, svg");
  }});
  const style = getComputedStyle(inner.body);
  found.textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth,
    wide: wide.map((e) => e.tagName + "." + e.className).slice(0, 5),
    ground: style.backgroundColor, ink: style.color,
    images: [...inner.images].filter((i) => !i.complete || !i.naturalWidth).length,
    lines: [...inner.querySelectorAll(".plot path")].length,
  }});
}};
</script>"""


def browse(*flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    common = (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--allow-file-access-from-files", "--virtual-time-budget=5000", "--hide-scrollbars",
    )  # fmt: skip
    return subprocess.run(
        [CHROMIUM, *common, *flags], capture_output=True, text=True, timeout=120, check=True
    )


def look(page: Path, folder: Path, width: int, scheme: int = 1) -> dict[str, Any]:
    """What the browser finds in the page at this width, all folds open."""
    opened = folder / "opened.html"
    opened.write_text(page.read_text().replace("<details", "<details open"))
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(page=opened.as_uri(), width=width))
    preference = f"--blink-settings=preferredColorScheme={scheme}"
    done = browse(preference, "--window-size=1400,900", "--dump-dom", wrapper.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stdout[-500:]
    return json.loads(html.unescape(found[1]))


@needs_chromium
@pytest.mark.parametrize("which", ["page", "hostile"])
def test_a_phone_never_scrolls_sideways(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found = look(request.getfixturevalue(which), tmp_path, width=360)
    assert found["client"] == 360
    assert (found["scroll"], found["wide"]) == (360, [])
    assert found["images"] == 0 and found["lines"] > 50


@needs_chromium
def test_light_and_dark_follow_the_reader_with_enough_contrast(tmp_path: Path) -> None:
    put(tmp_path / "config.json", CONFIG)
    page = write_report(tmp_path)

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = (look(page, tmp_path, width=1200, scheme=scheme) for scheme in (1, 0))
    assert luminance(light["ground"]) > 0.9 and luminance(dark["ground"]) < 0.05
    for found in (light, dark):
        low, high = sorted((luminance(found["ground"]), luminance(found["ink"])))
        assert (high + 0.05) / (low + 0.05) > 7


@needs_chromium
def test_the_page_is_drawn(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    done = browse("--window-size=1280,2600", f"--screenshot={shot}", page.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == 1280
    bands = np.array_split(pixels, 8)
    assert all(band.std() > 5 for band in bands)  # something in each part of it
