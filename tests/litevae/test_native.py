"""The CPU kernels against PyTorch in double precision; what is done where they can't be compiled."""

import copy
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from litevae import native
from litevae.autoencoder import LiteVAE
from litevae.denoiser import build_denoiser
from litevae.inference import best_kernels, memory_format, prepare_for_inference
from litevae.latents import encode_latents
from litevae.layers import ResBlock

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def kernels():
    if not native.available():
        pytest.skip("no C++ compiler")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def within(found, expected, tolerance=1e-5):
    """Of the largest value: what a sum of many products can be held to."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{error:.1e}"


SHAPES = [  # images, maps in, maps out, height, width: whole tiles and blocks, and parts of them
    (1, 32, 32, 32, 32), (3, 12, 32, 16, 20), (2, 32, 12, 9, 14), (1, 1, 1, 1, 1), (2, 7, 17, 5, 3),
    (1, 96, 96, 20, 20), (1, 300, 40, 8, 8), (1, 40, 300, 8, 12), (5, 36, 8, 4, 4), (1, 520, 16, 6, 6),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_equals_torchs(shape, generator):
    n, fewer, more, h, w = shape
    conv = torch.nn.Conv2d(fewer, more, 3, padding=1).requires_grad_(False)
    x = torch.randn(n, fewer, h, w, generator=generator).to(memory_format=LAST)
    added = torch.randn(n, more, h, w, generator=generator)  # also where it is not channels last
    fast, exact = native.FastConv2d(conv), copy.deepcopy(conv).double()
    expected = exact(x.double())
    within(fast(x), expected)
    within(fast(x.contiguous(), added), expected + added)
    without = torch.nn.Conv2d(fewer, more, 3, padding=1, bias=False).requires_grad_(False)
    without.weight = conv.weight
    within(native.FastConv2d(without)(x), F.conv2d(x.double(), conv.weight.double(), padding=1))


@pytest.mark.parametrize(
    ("channels", "groups", "pixels"), [(32, 32, 40), (48, 16, 7), (160, 32, 33), (9, 3, 1), (6, 1, 2)]
)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_normalisation_and_activation_equal_torchs(channels, groups, pixels, mean, generator):
    x = torch.randn(2, channels, pixels, pixels, generator=generator).to(memory_format=LAST) * 3 + mean
    norm = torch.nn.GroupNorm(groups, channels, 1e-6).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    expected = F.silu(copy.deepcopy(norm).double()(x.double()))
    within(native.norm_silu(x, norm), expected, 2e-5)
    plain = torch.nn.GroupNorm(groups, channels, 1e-6, affine=False)
    within(native.norm_silu(x, plain), F.silu(plain(x.double())), 2e-5)
    native.norm_silu(x, norm, out=x)
    within(x, expected, 2e-5)


def test_activation_over_the_whole_range():
    x = torch.linspace(-200, 200, 4000).view(1, 1, 40, 100).contiguous(memory_format=LAST)
    as_it_is = torch.nn.GroupNorm(1, 1, 0.0).requires_grad_(False)  # gives back what it takes
    as_it_is.weight.fill_(x.double().std(correction=0))
    as_it_is.bias.fill_(x.double().mean())
    found, expected = native.norm_silu(x, as_it_is), F.silu(x.double())
    within(found, expected, 1e-6)
    small = x.abs() < 20
    assert ((found - expected).abs()[small] <= 1e-5).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.zeros(1, 16, 8, 8).to(memory_format=LAST)
    x[0, 3, 4, 4] = bad
    conv = torch.nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    assert not native.FastConv2d(conv)(x)[0, :, 3:6, 3:6].isfinite().any()
    assert not native.norm_silu(x, torch.nn.GroupNorm(1, 16).requires_grad_(False)).isfinite().all()


def filled(model):
    """Blocks that add nothing, as at the start of training, would hide an error."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", ["S", "B", pytest.param("sd-vae", marks=pytest.mark.slow)])
def test_an_autoencoder_equals_itself(size, generator):
    torch.manual_seed(1)
    model = filled(LiteVAE(size, block_out_channels=(16, 32, 64, 64)))
    x = torch.rand(2, 3, 64, 48, generator=generator) * 2 - 1
    exact = copy.deepcopy(model).double()
    # (the pyramid is taken in fp32)
    latents, state = encode_latents(exact, x.double()), model.state_dict()
    images = exact.decode(latents[:, :4]).sample
    fast = prepare_for_inference(copy.deepcopy(model), "cpu", "native")
    within(encode_latents(fast, x), latents)
    within(fast.decode(latents[:, :4].float()).sample, images)
    assert fast.state_dict().keys() == state.keys()
    assert any(isinstance(layer, native.FastResBlock) for layer in fast.encoder.modules())


def test_diffusers_models_equal_themselves(generator):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(**blocks, block_out_channels=(32, 64)).eval()
    x = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    with torch.inference_mode():
        expected = encode_latents(copy.deepcopy(model).double(), x.double())
        fast = prepare_for_inference(model, "cpu", "native")
        within(encode_latents(fast, x), expected)
    unet = filled(build_denoiser("tiny", 4, 8, 0))
    z, steps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1, 500])
    with torch.inference_mode():
        expected = copy.deepcopy(unet).double()(z.double(), steps).sample
        within(prepare_for_inference(unet, "cpu", "native")(z, steps).sample, expected)


def test_an_images_latents_depend_neither_on_its_batch_nor_on_threads(generator):
    model = prepare_for_inference(filled(LiteVAE("S", block_out_channels=(16, 16, 16, 16))), "cpu", "native")
    x = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = encode_latents(model, x)
        torch.set_num_threads(3)
        assert torch.equal(encode_latents(model, x[1:2]), together[1:2])
    finally:
        torch.set_num_threads(threads)


def test_only_models_in_fp32_on_a_cpu_are_taken():
    with pytest.raises(ValueError, match="fp32 on a CPU"):
        native.accelerate(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1)).bfloat16())
    assert best_kernels("cpu", "fp32") == "native"
    assert best_kernels("cpu", "bf16") == best_kernels("cuda", "fp32") == "torch"


def test_a_gpu_takes_channels_last_only_where_normalisation_is_compiled():
    assert memory_format("cpu", compiled=False) == memory_format("cuda", compiled=True) == LAST
    assert memory_format("cuda:1", compiled=False) == torch.contiguous_format


def test_what_a_convolution_is_replaced_by_depends_on_its_form():
    def conv(**options):
        return torch.nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1} | options)

    others = [
        conv(stride=2),
        conv(padding=0),
        conv(groups=2),
        conv(kernel_size=1),
        conv(dilation=2),
        conv(padding_mode="reflect"),
    ]
    model = native.accelerate(torch.nn.Sequential(conv(), *others))
    assert [type(layer) for layer in model] == [native.FastConv2d] + [torch.nn.Conv2d] * len(others)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Kernels that were not compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "litevae"
    native._library.cache_clear()


@pytest.mark.usefixtures("anew", "no_home")
def test_without_a_home_folder_there_are_no_kernels():
    assert not native.available()
    with pytest.raises(native.NoKernels, match="no home folder for compiled kernels: set HOME or XDG_CACHE_HOME"):
        native._library()


def test_compiled_once_and_kept(anew, monkeypatch):
    assert native.available()
    (kept,) = anew.iterdir()
    assert anew.stat().st_mode & 0o077 == 0  # what others could write here would be run
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    native._library.cache_clear()
    assert native.available()
    assert [*anew.iterdir()] == [kept]


def test_no_compiler_or_one_that_fails(anew, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not native.available()
    assert best_kernels("cpu", "fp32") == "torch"
    with pytest.raises(native.NoKernels, match="install g\\+\\+, or name one in CXX"):
        native.accelerate(torch.nn.Sequential())
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 1; else echo no space >&2; exit 1; fi\n')
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("PATH", os.defpath)
    with pytest.raises(native.NoKernels, match="could not compile .*no space"):
        native.accelerate(torch.nn.Sequential())
    assert [*anew.iterdir()] == []  # nothing half-made


# --- what is refused, and what is noticed ---------------------------------------------------------------------------


def layer(fewer=4, more=6, **options):
    torch.manual_seed(0)
    return native.FastConv2d(torch.nn.Conv2d(fewer, more, 3, padding=1, **options).requires_grad_(False))


BAD_INPUTS = {
    "more channels": (torch.zeros(1, 8, 4, 4), "shape"),
    "one channel": (torch.zeros(1, 1, 4, 4), "shape"),
    "three dimensions": (torch.zeros(4, 4, 4), "shape"),
    "meta": (torch.zeros(1, 4, 4, 4, device="meta"), "meta"),
    "integers": (torch.zeros(1, 4, 4, 4, dtype=torch.int64), "int64"),
    "double": (torch.zeros(1, 4, 4, 4, dtype=torch.float64), "float64"),
    "sparse": (torch.zeros(1, 4, 4, 4).to_sparse(), "dense"),
    "gradient": (torch.zeros(1, 4, 4, 4, requires_grad=True), "gradient"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_inputs_that_the_kernels_cannot_read_are_refused(bad):
    x, message = BAD_INPUTS[bad]
    with pytest.raises(ValueError, match=message):
        layer()(x)
    with pytest.raises(ValueError, match=message):
        native.norm_silu(x, torch.nn.GroupNorm(2, 4).requires_grad_(False))


def test_no_pixels_are_refused_and_no_images_give_none():
    with pytest.raises(ValueError, match="no pixels"):
        layer()(torch.zeros(1, 4, 0, 4))
    assert layer()(torch.zeros(0, 4, 5, 7)).shape == (0, 6, 5, 7)
    assert native.norm_silu(torch.zeros(0, 4, 5, 7), torch.nn.GroupNorm(2, 4).requires_grad_(False)).shape[0] == 0


@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (2, 6, 4, 4), (1, 6, 4, 5), (6, 4, 4)], ids=str)
def test_what_is_added_must_have_the_shape_of_the_output(shape):
    with pytest.raises(ValueError, match="what is added must have the shape"):
        layer()(torch.zeros(1, 4, 4, 4), torch.zeros(shape))


def test_the_output_of_a_normalisation_must_fit():
    x, norm = torch.zeros(1, 4, 4, 4), torch.nn.GroupNorm(2, 4).requires_grad_(False)
    for out in (torch.zeros(1, 4, 4, 5), x.bfloat16(), torch.zeros(1, 4, 4, 4)):  # the last is channels first
        with pytest.raises(ValueError, match="the output must"):
            native.norm_silu(x, norm, out=out)
    with pytest.raises(ValueError, match="the weight of this layer"):
        native.norm_silu(x, norm.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_inputs_are_cast_without_loss(dtype, generator):
    x, conv = torch.randn(2, 4, 5, 6, generator=generator).to(dtype), layer()
    assert torch.equal(conv(x), conv(x.float()))
    assert conv(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x.float()), conv(x.float()))
        assert conv(x.float()).dtype == torch.float32


def test_under_autocast_a_block_computes_in_fp32(generator):
    block = native.FastResBlock(filled(ResBlock(16, 32)))
    x = torch.randn(1, 16, 8, 8, generator=generator)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block(x), expected)


def doubled(model):
    for parameter in model.parameters():
        parameter.mul_(2)


def assigned(model):
    model.weight = torch.nn.Parameter(2 * model.weight, requires_grad=False)
    model.bias = torch.nn.Parameter(2 * model.bias, requires_grad=False)


def through_data(model):
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data


def there_and_back(model):
    """The memory of the old weights must not be given to the new ones, or both would look the same."""
    doubled(model.bfloat16().float())


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict({key: 2 * value for key, value in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({key: 2 * value for key, value in m.state_dict().items()}, assign=True),
    "in place": doubled, "assigned": assigned, "data": through_data, "bfloat16 and back": there_and_back,
}  # fmt: skip


@pytest.mark.parametrize("mode", [False, True], ids=["outside", "in inference mode"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(change, mode, generator):
    with torch.inference_mode(mode):
        conv, x = layer(), torch.randn(1, 4, 6, 6, generator=generator)
        conv(x)
        CHANGES[change](conv)
        within(conv(x), F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "meta"])
def test_weights_that_are_no_longer_fp32_on_a_cpu_are_refused(cast):
    model = native.accelerate(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1)))
    model = model.to("meta") if cast == "meta" else getattr(model, cast)()
    with pytest.raises(ValueError, match="load the model again"):
        model(torch.zeros(1, 4, 4, 4))


def test_weights_that_train_are_refused():
    model = native.accelerate(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1))).requires_grad_(True)
    with pytest.raises(ValueError, match="requires a gradient, and none flows"):
        model(torch.zeros(1, 4, 4, 4))
    with torch.no_grad():
        model(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_weights_of_their_own(way, generator):
    model = native.accelerate(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), filled(ResBlock(4, 4))))
    x = torch.randn(1, 4, 6, 6, generator=generator)
    expected, other = model(x), way(model)
    assert torch.equal(other(x), expected)
    other[0].weight.zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(other(x), expected)


@pytest.mark.slow
def test_sanitizers_report_nothing(tmp_path):
    driver = Path(__file__).with_name("native_driver.cpp")
    compiler, program = os.environ.get("CXX", "g++"), str(tmp_path / "driver")
    flags = ["-O1", "-g", "-march=native", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    subprocess.run([compiler, *flags, *sanitize, str(native.SOURCE), str(driver), "-o", program], check=True)
    env = os.environ | {"OMP_NUM_THREADS": "3", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run([program], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "all equal\n"), done.stdout + done.stderr[-3000:]
