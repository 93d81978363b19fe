"""DiT (Peebles & Xie, arXiv 2212.09748) with adaLN-Zero, as a diffusers model.

The DiTTransformer2DModel of diffusers has an embedder of timestep and label in every block; the paper has only one.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from litevae.errors import UserError

_FREQUENCIES = 256  # size of the timestep encoding, half cosines and half sines


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero: attention, then an MLP.

    The condition gives a shift and a scale for the input of each, and a gate for its output. The gates start at zero,
    so that a new block is the identity.
    """

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = _norm(hidden_size), _norm(hidden_size)
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU("tanh"), nn.Linear(4 * hidden_size, hidden_size)
        )
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply the block to tokens (N, T, D) under a condition (N, D), to which SiLU is already applied."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self._attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(ModelMixin, ConfigMixin):
    """DiT: a transformer on patches of latents (N, in_channels, sample_size, sample_size), with or without classes.

    The position embedding is fixed (sines and cosines) and not a parameter. It follows from the config and is not
    saved. The paper's table (33 M, 130 M, 458 M, 675 M) does not count it either. The authors' code counts it as a
    frozen parameter: there XL/2 at 256 px has 675,129,632 parameters, of which 294,912 are the position embedding.

    The model never drops labels. To train for guidance, the caller replaces some labels by the label of "no class"
    (`litevae.denoiser.null_class`).

    Args:
        sample_size: Side of the latents. Latents of other sizes are refused.
        in_channels: Number of latent channels.
        out_channels: Number of output channels. It is 2 * in_channels in the paper, which also predicts a variance.
        hidden_size: Width D of the tokens, a multiple of 4 and of the number of heads.
        num_layers: Number of blocks.
        num_attention_heads: Number of attention heads.
        patch_size: Side of a patch.
        num_class_embeds: Number of rows of the label table, including that of "no class". None for an unconditional
            model.

    Raises:
        UserError: if `sample_size` is not a multiple of `patch_size`, or `hidden_size` is not a multiple of 4 and of
            the number of heads.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        patch_size: int = 2,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        if sample_size < 1 or sample_size % patch_size:
            raise UserError(f"DiT: sample_size={sample_size} is not a multiple of patch_size={patch_size}")
        if hidden_size % 4 or hidden_size % num_attention_heads:
            raise UserError(
                f"DiT: hidden_size={hidden_size} must be a multiple of 4 (sines and cosines of rows and columns) and "
                f"of num_attention_heads={num_attention_heads}"
            )
        self.gradient_checkpointing = False
        grid = sample_size // patch_size
        positions = get_2d_sincos_pos_embed(hidden_size, grid, base_size=grid, output_type="pt")
        self.register_buffer("pos_embed", positions.float(), persistent=False)
        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.time_proj = Timesteps(_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(_FREQUENCIES, hidden_size)
        self.class_embedding = nn.Embedding(num_class_embeds, hidden_size) if num_class_embeds else None
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.norm_out = _norm(hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, out_channels * patch_size**2)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise the weights as in the authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("time_embedding", "class_embedding")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "modulation" in name or name.startswith("proj_out"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the target for noisy latents.

        Args:
            sample: Noisy latents (N, in_channels, sample_size, sample_size).
            timestep: Noise level in [0, 1000], one for all or (N,). It need not be an integer.
            class_labels: Labels (N,), int64, below `num_class_embeds`. None for an unconditional model.
            return_dict: Whether to return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            The prediction (N, out_channels, sample_size, sample_size), as `.sample` or in a tuple.

        Raises:
            UserError: if the latents have another shape, or if labels are missing, or given to an unconditional model.
        """
        config = self.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        if sample.shape[1:] != shape:
            raise UserError(f"this DiT takes latents (N, {', '.join(map(str, shape))}), not {tuple(sample.shape)}")
        if class_labels is None and self.class_embedding is not None:
            raise UserError(
                "this DiT is class-conditional: it needs class_labels, and for images without a class the null label"
            )
        if class_labels is not None and self.class_embedding is None:
            raise UserError("this DiT is unconditional: it takes no class_labels; leave them out")

        p, grid = config.patch_size, config.sample_size // config.patch_size
        patches = F.pixel_unshuffle(sample, p).flatten(2).transpose(1, 2)
        # Cast to the dtype of the weights: tokens stay fp32 under autocast, and a model loaded as bf16 runs in bf16.
        x = self.patch_embed(patches) + self.pos_embed.to(self.dtype)  # (N, T, D)
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        condition = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(class_labels)
        condition = F.silu(condition)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition)
            else:
                x = block(x, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))  # (N, rows, columns, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
