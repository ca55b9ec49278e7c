"""The benchmarks run, compare like with like, and say what they need."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from .warm import warm_python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([*warm_python(), BENCHMARKS / name, *options], capture_output=True, text=True)


def test_the_step_and_its_dense_mask_reference_have_the_same_loss():
    options = "--size tiny --batch 1 --pairs 1 --threads 1 --part dense --precision float32 --mode eager"
    result = benchmark("pretrain_step.py", *options.split())
    assert result.returncode == 0, result.stderr
    figure = json.loads(result.stdout)
    ours, theirs = figure["losses"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert 0 < figure["bytes_ratio"] < 1


def test_kmeans_and_bare_faiss_find_the_same_centroids():
    options = "time --count 40000 --dim 64 --k 32 --iterations 3 --pairs 1 --threads 1"
    result = benchmark("kmeans.py", *options.split())
    assert result.returncode == 0, result.stderr
    inside, outside, decoding = map(json.loads, result.stdout.splitlines())
    for figure in (inside, outside):
        assert figure["objective_ratio"] == pytest.approx(1, rel=1e-5)
        assert figure["same_centroids"]
    assert decoding["in_blocks_ns"] > 0


def test_hierarchical_kmeans_is_compared_with_lloyd():
    options = "--count 20000 --dim 16 --k 64 --iterations 3 --threads 1"
    result = benchmark("kmeans_algorithms.py", *options.split())
    assert result.returncode == 0, result.stderr
    figures = {figure["figure"].partition(":")[0]: figure for figure in map(json.loads, result.stdout.splitlines())}
    assert set(figures) == {"error", "held_out_error", "seconds", "cpu_seconds", "dead"}
    assert 0.9 < figures["error"]["ratio"] < 1.5


def test_kmeans_out_of_core_holds_less_memory_and_finds_the_same(tmp_path: Path):
    options = "memory --count 300000 --k 32 --iterations 2 --memory 60MB --threads 1 --folder"
    result = benchmark("kmeans.py", *options.split(), str(tmp_path))
    assert result.returncode == 0, result.stderr
    figure = json.loads(result.stdout)
    assert figure["objective_ratio"] == pytest.approx(1, rel=1e-5)
    # The rows in float32 are 77 MB.
    assert figure["in memory"]["peak_anonymous_mb"] - figure["out of core"]["peak_anonymous_mb"] > 50
    assert not list(tmp_path.iterdir())


def test_the_storage_benchmark_accounts_for_every_byte_of_a_view(chain):
    result = benchmark("storage.py", str(chain.tokens), "--reads", "1")
    assert result.returncode == 0, result.stderr
    store, *figures = map(json.loads, result.stdout.splitlines())
    columns = {one["figure"]: one["bytes_per_view"] for one in figures if one["figure"].startswith("column ")}
    assert len(columns) == 10
    assert sum(columns.values()) < store["bytes_per_view"]
    assert store["plain_bits_bytes_per_view"] == 4 * 64 / 8
    assert store["entropy_bytes_per_view"] <= store["plain_bits_bytes_per_view"]
    (chosen,) = (
        one["bytes_per_view"]
        for one in figures
        if one["figure"] == "tokens, blosc zstd 9 bitshuffle" and one["rows_per_chunk"] == 1024
    )
    assert chosen == columns["column tokens"]


def test_the_loader_is_measured_beside_bare_decoding_and_the_usual_pipeline(chain):
    options = "--pairs 1 --passes 1 --workers 1 --jitter 0.4 --batch-size 16 --crop center --part bare --part usual"
    result = benchmark("loader.py", str(chain.tars[0]), *options.split())
    assert result.returncode == 0, result.stderr
    bare, usual = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
    assert min(bare["ratio"], bare["cpu_ratio"], usual["ratio"], usual["cpu_ratio"]) > 0
    assert (bare["images"], bare["workers"]) == (32, 1)


def test_inspect_is_measured_against_reading_the_same_store(tmp_path: Path):
    options = "--images 1500 --grid 6 --k 300 --classes 10 --views 2 --folder"
    result = benchmark("inspect_store.py", *options.split(), str(tmp_path))
    assert result.returncode == 0, result.stderr
    write, read, inspected, ratio = map(json.loads, result.stdout.splitlines())
    assert (write["figure"], read["images"], inspected["images"]) == ("write", 1500, 1500)
    assert inspected["peak_rss_mb"] > 0
    assert ratio["times"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says something else where there is a GPU")
def test_the_gpu_check_is_refused_in_one_sentence_without_a_gpu():
    result = benchmark("gpu_check.py")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert "CUDA device" in result.stderr


def test_the_plan_of_a_cluster_in_the_documentation_is_what_the_script_prints():
    result = benchmark("cluster_plan.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in (BENCHMARKS.parent / "docs" / "scale.md").read_text()


def test_the_plan_of_a_cluster_follows_its_formulas():
    options = "--gpus 1 --rate 100 --tower-gflops 10 --tower-share 0.5 --peak 1 --decoding 30 --cores 1 --price 2"
    result = benchmark(
        "cluster_plan.py", *options.split(), *["--efficiency", "0.5", "--gpu-batch", "142", "--views", "1"]
    )
    assert result.returncode == 0, result.stderr
    cells = next(line for line in result.stdout.splitlines() if "22k, 1 " in line).split("|")[2:-1]
    # 30 images are decoded a second, in half of the time; 150 epochs of 100,000 steps of 142 images, decoded as fast.
    tokenizing, pretraining = 14.2e6 / 30 / 0.5 / 3600, 150 * 100_000 * 142 / 30 / 0.5 / 3600
    expected = ["142", f"{tokenizing:,.1f}", f"{tokenizing * 2:,.0f}", f"{pretraining:,.1f}", f"{pretraining * 2:,.0f}"]
    assert [cell.strip() for cell in cells] == expected
