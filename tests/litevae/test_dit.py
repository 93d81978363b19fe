"""DiT against diffusers' DiTTransformer2DModel, the paper's counts and formulas written out."""

import math
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from litevae.denoiser import DITS
from litevae.dit import DiT
from litevae.errors import UserError

CLASSES = 10


def make(classes: int | None = CLASSES, noise: float = 0.1, **config) -> DiT:
    """A small one, away from the zeros of the initialisation unless noise=0."""
    torch.manual_seed(0)
    small = {"sample_size": 8, "hidden_size": 48, "num_layers": 3, "num_attention_heads": 3}
    model = DiT(**(small | config), num_class_embeds=classes and classes + 1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def inputs(channels: int = 4, size: int = 8):
    torch.manual_seed(1)
    return torch.randn(3, channels, size, size), torch.tensor([0, 417, 999]), torch.tensor([3, 0, CLASSES])


# --- the function it computes


def diffusers_twin(model: DiT) -> DiTTransformer2DModel:
    """diffusers' model with the same weights; each block's embedder gets our one."""
    config, heads = model.config, model.config.num_attention_heads
    twin = DiTTransformer2DModel(
        heads,
        config.hidden_size // heads,
        config.in_channels,
        config.out_channels,
        config.num_layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_class_embeds - 1,
        norm_eps=1e-6,  # the paper's
    ).eval()
    own = model.state_dict()
    shape = (-1, config.in_channels, config.patch_size, config.patch_size)
    state = {"pos_embed.proj.weight": own["patch_embed.weight"].view(shape)}

    def copy(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = own[f"{source}.{kind}"]

    state["pos_embed.proj.bias"] = own["patch_embed.bias"]
    copy("proj_out_1", "modulation")
    copy("proj_out_2", "proj_out")
    for i, block in enumerate(twin.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the paper's frequencies
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        for layer in ("linear_1", "linear_2"):
            copy(f"{there}.norm1.emb.timestep_embedder.{layer}", f"time_embedding.{layer}")
        state[f"{there}.norm1.emb.class_embedder.embedding_table.weight"] = own["class_embedding.weight"]
        copy(f"{there}.norm1.linear", f"{here}.modulation")
        copy(f"{there}.attn1.to_out.0", f"{here}.to_out")
        copy(f"{there}.ff.net.0.proj", f"{here}.mlp.0")
        copy(f"{there}.ff.net.2", f"{here}.mlp.2")
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", own[f"{here}.to_qkv.{kind}"].chunk(3), strict=True):
                state[f"{there}.attn1.to_{name}.{kind}"] = part
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize(
    "config", [{}, {"in_channels": 3, "out_channels": 6, "patch_size": 4, "sample_size": 16}, {"patch_size": 1}]
)
@torch.no_grad()
def test_equals_diffusers(config):
    model = make(**config)
    sample, timestep, labels = inputs(model.config.in_channels, model.config.sample_size)
    got = model(sample, timestep, labels).sample
    expected = diffusers_twin(model)(sample, timestep, labels).sample
    assert got.shape == (3, model.config.out_channels, model.config.sample_size, model.config.sample_size)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for other in (model(sample, timestep + 1, labels), model(sample, timestep, labels.roll(1))):
        assert (other.sample - got).abs().max() > 1e-3  # both conditions matter


def test_frequencies_of_the_timestep_by_hand():
    row = make().time_proj(torch.tensor([417.5]))[0]
    angles = [417.5 * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=5e-5)


def test_position_embedding_by_hand():
    """Half of the width for the column, half for the row; in each the sines, then the cosines (MAE's code)."""
    model = make()
    row, column, quarter = 2, 3, 12
    frequencies = [10000 ** (-i / quarter) for i in range(quarter)]
    expected = [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(model.pos_embed[4 * row + column], torch.tensor(expected))


@torch.no_grad()
def test_a_timestep_may_be_a_number_or_a_tensor_whole_or_not():
    model = make(classes=None)
    sample = inputs()[0]
    for number in (7, 7.25):
        expected = model(sample, torch.tensor([number] * 3)).sample
        for same in (number, torch.tensor(number), torch.tensor([number])):
            assert torch.equal(model(sample, same).sample, expected)
    assert not torch.equal(model(sample, 7).sample, expected)


# --- the initialisation


def test_a_fresh_block_is_the_identity_and_a_fresh_model_predicts_zero():
    model = make(noise=0)
    tokens, condition = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert all(torch.equal(block(tokens, condition), tokens) for block in model.blocks)
    assert not model(*inputs()).sample.any()


def test_initialisation_is_the_papers():
    model = make(noise=0, hidden_size=192, num_layers=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "modulation" in name or name.startswith("proj_out"):
            assert not parameter.any(), name
        elif name.startswith(("time_embedding", "class_embedding")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:  # xavier: uniform in +-sqrt(6 / (fan_in + fan_out))
            bound = math.sqrt(6 / sum(parameter.shape))
            assert bound * 0.95 < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


# --- its size


def count(width: int, depth: int, channels: int, out: int, labels: int) -> int:
    """Parameters of the paper's Figure 3, layer by layer."""

    def linear(i, o):
        return i * o + o

    block = linear(width, 3 * width) + linear(width, width)  # attention
    block += linear(width, 4 * width) + linear(4 * width, width)  # MLP
    block += linear(width, 6 * width)  # shifts, scales, gates
    embedders = linear(4 * channels, width) + linear(256, width) + linear(width, width) + labels * width
    return depth * block + embedders + linear(width, 2 * width) + linear(width, 4 * out)


# Millions: Peebles & Xie, Table 4 (B/2 would be 131 with the position embedding). Exact: `count`. The authors' program
# logs frozen parameters too: 675,129,632 for XL/2 in many reports, which is with its position embedding, 256 x 1152.
@pytest.mark.parametrize(
    ("network", "millions", "exact", "with_positions"),
    [
        ("dit-s/2", 33, 32_865_056, 32_963_360),
        ("dit-b/2", 130, 130_315_808, 130_512_416),
        ("dit-l/2", 458, 457_840_672, 458_102_816),
        ("dit-xl/2", 675, 674_834_720, 675_129_632),
    ],
)
def test_sizes_are_the_published_ones(network, millions, exact, with_positions):
    width, depth, heads = DITS[network]
    with torch.device("meta"):  # as in the paper: variances predicted as well, ImageNet, 256 px
        model = DiT(32, 4, 8, width, depth, heads, num_class_embeds=1001)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == exact == count(width, depth, 4, 8, 1001)
    assert round(parameters / 1e6) == millions
    assert parameters + model.pos_embed.numel() == with_positions
    assert not any("pos_embed" in name for name in model.state_dict())


# --- as a model of diffusers


@pytest.mark.parametrize("classes", [CLASSES, None])
@torch.no_grad()
def test_save_and_load(tmp_path, classes):
    model = make(classes, out_channels=8)
    model.save_pretrained(tmp_path)
    loaded, report = DiT.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    sample, timestep, labels = inputs()
    labels = labels if classes else None
    assert torch.equal(loaded(sample, timestep, labels).sample, model(sample, timestep, labels).sample)
    assert (loaded.config.sample_size, loaded.config.in_channels, loaded.config.out_channels) == (8, 4, 8)
    assert torch.equal(loaded(sample, timestep, labels, return_dict=False)[0], loaded(sample, timestep, labels).sample)


def gradients(model: DiT) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*inputs()).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_checkpointing_recomputes_blocks_and_gives_equal_gradients():
    model = make().train()
    plain, calls = gradients(model), []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    again = gradients(model)
    assert len(calls) == 2
    assert all(value.any() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-8)
    model.disable_gradient_checkpointing()
    gradients(model)
    assert len(calls) == 3


def test_learns():
    torch.manual_seed(0)
    model, target, losses = make(noise=0).train(), torch.randn(3, 4, 8, 8), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = (model(*inputs()).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_training_mode_changes_nothing():
    """Dropping labels is the trainer's."""
    model = make()
    with torch.no_grad():
        assert torch.equal(model.train()(*inputs()).sample, model.eval()(*inputs()).sample)


def test_bf16(tmp_path):
    model, tokens = make(), []
    exact = model(*inputs()).sample
    model.save_pretrained(tmp_path)
    model.norm_out.register_forward_pre_hook(lambda _, given: tokens.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs()).sample
    mixed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    sample, timestep, labels = inputs()
    whole = model.to(torch.bfloat16)(sample.bfloat16(), timestep, labels).sample
    assert tokens == [torch.float32, torch.bfloat16]  # autocast leaves the residual stream in fp32
    loaded = DiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)(sample.bfloat16(), timestep, labels).sample
    for each in (mixed, whole, loaded):
        assert each.dtype == torch.bfloat16
        error = (each.float() - exact).norm() / exact.norm()
        assert 0 < error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_into_one_graph(checkpointing):
    model = make()
    if checkpointing:
        model.enable_gradient_checkpointing()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()).sample, model(*inputs()).sample)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_inductors_kernels_compute_the_same():
    """Of one block: for CPUs each kernel takes seconds to compile."""
    model = make(num_layers=1)
    found = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        sample = forward(*inputs()).sample
        sample.square().mean().backward()
        found.append([sample.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


# --- mistakes


def test_labels_must_fit_the_model():
    sample, timestep, labels = inputs()
    with pytest.raises(UserError, match="conditional: it needs class_labels"):
        make()(sample, timestep)
    with pytest.raises(UserError, match="unconditional: it takes no class_labels"):
        make(classes=None)(sample, timestep, labels)


def test_other_latents_are_refused():
    model = make(classes=None)
    for shape in ((3, 4, 16, 16), (3, 3, 8, 8), (4, 8, 8)):
        with pytest.raises(UserError, match=r"takes latents \(N, 4, 8, 8\), not"):
            model(torch.randn(shape), 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 9}, "sample_size=9 is not a multiple of patch_size=2"),
        ({"hidden_size": 54}, "hidden_size=54 must be a multiple of 4"),
        ({"hidden_size": 40}, "of num_attention_heads=3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make(**config)


def test_every_parameter_is_of_a_linear_layer_or_the_label_table():
    """What `_initialise` goes by."""
    kinds = {type(m) for m in make().modules() if list(m.parameters(recurse=False))}
    assert kinds == {nn.Linear, nn.Embedding}
