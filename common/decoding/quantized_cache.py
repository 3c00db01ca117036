"""Few-bit keys and values of a KV cache as in KIVI (Liu et al. 2024): really packed, asymmetric.

Keys have channels with large entries at every token, values do not. So keys are quantized per
channel, over groups of tokens, and values per token, over groups of channels:

    code = round((x - min) / scale),  scale = (max - min) / (2^bits - 1),  x ~ code * scale + min
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedGroups:
  """Codes of an array in groups along its last axis but one (keys) or its last (values).

  Attributes:
    codes: uint8, like the array but 8 / bits times shorter along the grouped axis.
    scales, minimums: like the array but `group` times shorter along the grouped axis.
    bits: 1, 2, 4 or 8.
    axis: the grouped axis, -2 or -1.
  """

  codes: Array
  scales: Array
  minimums: Array
  bits: int = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})


def quantize_keys(keys: Array, *, bits: int = 2, group: int = 32) -> PackedGroups:
  """Quantizes each channel over groups of tokens. keys: [batch, kv_heads, slots, channels].

  Raises:
    ValueError: `group` does not divide the slots, or codes do not fill bytes.
  """
  return _quantize(keys, bits, group, axis=-2)


def quantize_values(values: Array, *, bits: int = 2, group: int = 32) -> PackedGroups:
  """Quantizes each token over groups of channels. values: [batch, kv_heads, slots, channels].

  Groups are as large as the head where that has fewer channels.

  Raises:
    ValueError: `group` does not divide the channels, or codes do not fill bytes.
  """
  return _quantize(values, bits, min(group, values.shape[-1]), axis=-1)


def dequantize(packed: PackedGroups, dtype=jnp.float32) -> Array:
  """The array that the codes stand for."""
  codes = jnp.moveaxis(packed.codes, packed.axis, -1)
  per_byte = 8 // packed.bits
  shifts = jnp.arange(per_byte, dtype=jnp.uint8) * jnp.uint8(packed.bits)
  codes = (codes[..., None] >> shifts) & jnp.uint8(2**packed.bits - 1)
  scales = jnp.moveaxis(packed.scales, packed.axis, -1)[..., None]
  minimums = jnp.moveaxis(packed.minimums, packed.axis, -1)[..., None]
  codes = codes.reshape(*scales.shape[:-1], -1).astype(jnp.float32)
  x = (codes * scales + minimums).astype(dtype)
  return jnp.moveaxis(x.reshape(*x.shape[:-2], -1), -1, packed.axis)


def write_packed(packed: PackedGroups, new: PackedGroups, offset: Array) -> PackedGroups:
  """Writes the slots of `new` from slot `offset`, int32 [] and a multiple of the group, on."""

  def write(old: Array, part: Array, slots_per_entry: int) -> Array:
    at = offset // slots_per_entry
    return jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), at, axis=2)

  if packed.axis == -1:
    per_code = per_group = 1
  else:
    per_code = 8 // packed.bits
    per_group = packed.codes.shape[2] * per_code // packed.scales.shape[2]
  return dataclasses.replace(
    packed,
    codes=write(packed.codes, new.codes, per_code),
    scales=write(packed.scales, new.scales, per_group),
    minimums=write(packed.minimums, new.minimums, per_group),
  )


def _quantize(x: Array, bits: int, group: int, axis: int) -> PackedGroups:
  size = x.shape[axis]
  if bits not in (1, 2, 4, 8) or size % group or group * bits % 8:
    raise ValueError(f"{size} entries in groups of {group} with {bits} bits do not fill bytes")
  dtype = x.dtype
  x = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
  grouped = x.reshape(*x.shape[:-1], -1, group)
  minimums = jnp.min(grouped, axis=-1, keepdims=True)
  scales = (jnp.max(grouped, axis=-1, keepdims=True) - minimums) / (2**bits - 1)
  # As stored: codes are chosen for the scales that they will be read with.
  minimums, scales = minimums.astype(dtype), scales.astype(dtype)
  safe = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
  codes = jnp.clip(jnp.round((grouped - minimums) / safe), 0, 2**bits - 1).astype(jnp.uint8)
  per_byte = 8 // bits
  codes = codes.reshape(*x.shape[:-1], -1, per_byte)
  shifts = jnp.arange(per_byte, dtype=jnp.uint8) * jnp.uint8(bits)
  back = lambda y: jnp.moveaxis(y, -1, axis)
  packed = jnp.sum(codes << shifts, axis=-1, dtype=jnp.uint8)
  return PackedGroups(back(packed), back(scales[..., 0]), back(minimums[..., 0]), bits, axis)
