"""Bugs that were in the field's loss heads, as changes to our source; tests/mutations.py puts them in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug: `old` is replaced by `new` in `file`, and one of `tests` must fail."""

    name: str
    source: str  # where it was seen
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ROWS = ("tests/test_rows.py",)
HEAD = ("tests/test_ops.py", "tests/test_ops_loss.py", "tests/test_head_properties.py")
TRITON = ("tests/test_kernels.py", "tests/test_kernels_gradient.py", "tests/test_kernels_ppo.py")
TRITON_TILES = ("tests/test_kernels_tile.py",)
TRAINER = ("tests/test_ppo.py", "tests/test_defects_update.py", "tests/test_trl_agreement.py", "tests/test_trainer.py")
STATISTICS_H, HEAD_H = "csrc/row_statistics.inc.hpp", "csrc/head_rows.inc.hpp"
SAMPLING = ("tests/test_sampling.py", "tests/test_sampling_limits.py")
SAMPLING_H = "csrc/sampling.inc.hpp"
LOOP, LOOPED = "csrc/decode_loop.cpp", ("tests/test_decode_loop.py",)
REWARDS = ("tests/test_reward_contract.py",)
CRITICS, SWITCHING = ("tests/test_critics.py",), ("tests/test_switching.py",)
SCHEDULE, PAGED = ("tests/test_schedule.py",), ("tests/test_paged_engine.py",)

MUTATIONS = [
    Mutation(
        "tail joins the sum (C++)",
        "verl: padded columns without a mask",
        STATISTICS_H,
        "for (std::int64_t i = count; i < padded; ++i) z[i] = minus_infinity();",
        "",
        ROWS,
    ),
    Mutation(
        "tail joins the sum (Triton)",
        "verl: padded columns without a mask",
        "kernels/scaling.py",
        'return u, tl.where(inside, scale(u, inner, outer, HAS_SOFTCAP), float("-inf"))',
        "return u, scale(u, inner, outer, HAS_SOFTCAP)",
        TRITON,
    ),
    Mutation(
        "tail masked before the soft cap (Triton)",
        "cut-cross-entropy: -inf becomes -cap",
        "kernels/scaling.py",
        """    u = tl.load(row_ptr + columns, mask=inside, other=0.0).to(ACC)
    # The tail is masked after scaling, where a cap can no longer turn -inf into a finite number.
    return u, tl.where(inside, scale(u, inner, outer, HAS_SOFTCAP), float("-inf"))""",
        """    u = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(ACC)
    return u, scale(u, inner, outer, HAS_SOFTCAP)""",
        TRITON,
    ),
    Mutation(
        "running maximum starts at -inf (Triton)",
        "Liger: a leading -inf block is NaN",
        "kernels/row_statistics.py",
        """    m = tl.full((), -1e30, ACC)
    ref_m""",
        """    m = tl.full((), float("-inf"), ACC)
    ref_m""",
        TRITON,
    ),
    Mutation(
        "running maximum starts at 0 (C++)",
        "SkyRL: strongly negative logits",
        STATISTICS_H,
        "constexpr float lowest = -1e30f;",
        "constexpr float lowest = 0.0f;",
        ROWS,
    ),
    Mutation(
        "true class read, changed and written in low precision (C++)",
        "Liger #1268: confident tokens lose their gradient",
        HEAD_H,
        "const float dz_label = -t.g * __builtin_expm1f(t.logprob) + __builtin_expf(lp) * slope_label;",
        """const float dz_label = [&] {
    BFloat16 p, one_less;
    from_float(__builtin_expf(lp), &p);
    from_float(1.0f - to_float(p), &one_less);
    return t.g * to_float(one_less) + __builtin_expf(lp) * slope_label;
  }();""",
        ROWS,
    ),
    Mutation(
        "true class left out (C++)",
        "dL/dz without its one-hot term",
        HEAD_H,
        "  if (is_valid) from_float(dz_label",
        "  if (false) from_float(dz_label",
        ROWS,
    ),
    Mutation(
        "true class left out (Triton)",
        "dL/dz without its one-hot term",
        "kernels/logit_gradient.py",
        "dz = rest + tl.where(columns == label, label_gradient, -g * p)",
        "dz = rest - g * p",
        TRITON,
    ),
    Mutation(
        "entropy gradient dropped (C++)",
        "TRL's chunked log-prob: e is ignored",
        HEAD_H,
        "const Vec base = fma(lp, Vec::of(-t.e), Vec::of(t.l - t.g - t.e * t.entropy));",
        "const Vec base = Vec::of(t.l - t.g);",
        ROWS,
    ),
    Mutation(
        "entropy gradient dropped (Triton)",
        "TRL's chunked log-prob: e is ignored",
        "kernels/logit_gradient.py",
        "factor -= e * (log_p + entropy)",
        "factor -= 0.0 * (log_p + entropy)",
        TRITON,
    ),
    Mutation(
        "entropy gradient dropped (reference)",
        "TRL's chunked log-prob: e is ignored",
        "fastppo/ops/reference_rows.py",
        "    if e is not None:\n        dz -=",
        "    if e is not None and False:\n        dz -=",
        HEAD,
    ),
    Mutation(
        "0 · inf in the entropy of masked tokens (C++)",
        "fp32 prototypes of several",
        STATISTICS_H,
        "even.add(max(floor, Vec::load(z + i) - m));",
        "even.add(Vec::load(z + i) - m);",
        ROWS,
    ),
    Mutation(
        "soft cap missing from the gradient (C++)",
        "chain rule of the cap",
        HEAD_H,
        "if (f.is_capped) du = du * Vec::load(slope + i);",
        "",
        ROWS,
    ),
    Mutation(
        "temperature missing from the gradient (C++)",
        "chain rule of the temperature",
        HEAD_H,
        "const float factor = rows.scaling.logit_scale * rows.scaling.inverse_temperature;",
        "const float factor = rows.scaling.logit_scale;",
        ROWS,
    ),
    Mutation(
        "ratio ignored (C++)",
        "Liger #1082: the importance ratio is left out",
        HEAD_H,
        "const float ratio = __builtin_expf(logprob - old),",
        "const float ratio = __builtin_expf(old - old),",
        ROWS,
    ),
    Mutation(
        "ratio ignored (Triton)",
        "Liger #1082: the importance ratio is left out",
        "kernels/ppo.py",
        "        ratio = tl.exp(logprob - old)\n",
        "        ratio = tl.exp(old - old)\n",
        TRITON,
    ),
    Mutation(
        "clipped rows keep their gradient (C++)",
        "a clip that clips only the value",
        HEAD_H,
        "is_clipped ? 0.0f : plain};",
        "plain};",
        ROWS,
    ),
    Mutation(
        "penalty's gradient left out (C++)",
        "k1 in the loss without its derivative",
        HEAD_H,
        "    out.g += t.kl_coef;\n",
        "",
        ROWS,
    ),
    Mutation(
        "k3 with the sign of the log-ratio turned",
        "k3 of the reversed ratio",
        "fastppo/reference.py",
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(log_ratio) - log_ratio",
        ("tests/test_reference.py", "tests/test_losses.py"),
    ),
    Mutation(
        "exact KL from the reference's side (C++)",
        "KL(q || p) for KL(p || q)",
        HEAD_H,
        "return has_kl ? fma(lp - lq - Vec::of(t.kl), Vec::of(t.k), base) : base;",
        "return has_kl ? fma(lq - lp - Vec::of(t.kl), Vec::of(t.k), base) : base;",
        ROWS,
    ),
    Mutation(
        "head's gradient not scaled by what comes from above",
        "Liger #968: dW summed before the upstream gradient",
        "fastppo/ops/loss.py",
        "grads = tuple(grad if grad is None else grad.mul_(upstream.to(grad.dtype)) for grad in grads)",
        "grads[0].mul_(upstream.to(grads[0].dtype))",
        HEAD,
    ),
    Mutation(
        "gradient of a frozen head computed",
        "Liger #1441, verl: dW although nobody wants it",
        "fastppo/ops/accumulate.py",
        "self.d_weight = _sum_of(weight, is_single, into) if needs[1] else None",
        "self.d_weight = _sum_of(weight, is_single)",
        HEAD,
    ),
    Mutation(
        "bf16 sum of the head's gradient over chunks",
        "Liger #512, axolotl #1601: rounds every chunk",
        "fastppo/ops/accumulate.py",
        "if is_single or weight.dtype in (torch.float32, torch.float64):",
        "if True:",
        HEAD,
    ),
    Mutation(
        "lower halves of the sum forgotten (C++)",
        "bf16 accumulation under another name",
        HEAD_H,
        "    low[i] = static_cast<std::uint16_t>(bits);\n",
        "    low[i] = 0;\n",
        ROWS,
    ),
    Mutation(
        "only the last chunk's gradient of the head",
        "an accumulator that is written, not added to",
        "fastppo/ops/accumulate.py",
        "            torch.addmm(self.total, du.t(), hidden, out=self.total)\n",
        "            torch.mm(du.t(), hidden, out=self.total)\n",
        HEAD,
    ),
    Mutation(
        "rows of a chunk follow from the number of rows",
        "Liger's chunk = f(T): results depend on the batch",
        "fastppo/ops/chunks.py",
        "chunks = cut(len(hidden), chunk_rows(len(weight), weight.device), offsets)",
        "chunks = cut(len(hidden), max(1, (len(hidden) + 1) // 2), offsets)",
        ("tests/test_ops_memory.py", *HEAD),
    ),
    Mutation(
        "weightless rows are computed",
        "positions that no loss reads are projected",
        "fastppo/ops/check.py",
        "is_kept &= weight != 0",
        "is_kept &= weight == weight",
        HEAD,
    ),
    Mutation(
        "numbers of the rows count the kept ones",
        "misaligned old log-probs after masking",
        "fastppo/ops/loss.py",
        "        numbers=kept,\n",
        "        numbers=torch.arange(len(kept)),\n",
        HEAD,
    ),
    Mutation(
        "hidden states stay where they were while rows of the gradient move",
        "a weight gradient of rows that do not belong together",
        "fastppo/ops/accumulate.py",
        "du[: len(order)], hidden[order], None",
        "du[: len(order)], hidden[: len(order)], None",
        HEAD,
    ),
    Mutation(
        "mean over the group instead of the minibatch",
        "trl #5890: the normaliser of a micro-batch",
        "fastppo/trainers/update.py",
        "weights, importance = minibatch.weights[tokens], experience.evaluation.importance\n",
        "weights, importance = minibatch.weights[tokens], experience.evaluation.importance\n"
        "    weights = weights / weights.sum()\n",
        TRAINER,
    ),
    Mutation(
        "partial sums of tiles merged without their maxima (Triton)",
        "split softmax without rescaling",
        "kernels/tile_statistics.py",
        "old_scale, tile_scale = tl.exp(m - new_m), tl.exp(tile_m - new_m)",
        "old_scale, tile_scale = tl.exp(m - new_m), tl.exp(0.0 * tile_m)",
        TRITON_TILES,
    ),
    Mutation(
        "random numbers by the row of the batch (C++)",
        "generators keyed by slot: a token depends on its neighbours",
        SAMPLING_H,
        "uniform(rows.seed, rows.requests[r], rows.positions[r])",
        "uniform(rows.seed, r, rows.positions[r])",
        SAMPLING,
    ),
    Mutation(
        "log-prob under the truncated distribution (C++)",
        "samplers that record what their warpers left",
        SAMPLING_H,
        "const double log_total = can_draw ? __builtin_log(all.weights)",
        "const double log_total = can_draw ? __builtin_log(choice.weight > 0 ? choice.weight : all.weights)",
        SAMPLING,
    ),
    Mutation(
        "kept mass of a truncated draw is 1 (C++)",
        "a mass that nobody computes",
        SAMPLING_H,
        "static_cast<float>(choice.weight / all.weights)",
        "1.0f",
        SAMPLING,
    ),
    Mutation(
        "every tie of top-p stays (C++)",
        "a nucleus that is larger than asked for",
        SAMPLING_H,
        "  equal = equal < 1 ? 1 : equal;\n",
        "  equal = found.equal;\n",
        SAMPLING,
    ),
    Mutation(
        "sequences whose blocks only touch share a step (C++)",
        "our own first form: 0 times the NaN of another sequence's slots",
        "csrc/attention.inc.hpp",
        "(lo < run->hi && hi > run->lo)",
        "(lo <= run->hi && hi >= run->lo)",
        ("tests/test_attention_ops.py",),
    ),
    Mutation(
        "soft cap of attention missing from its gradient (C++)",
        "our own first form: the derivative of tanh without the cap",
        "csrc/attention_tile.inc.hpp",
        "    *slopes = *slopes * Vec::of(how.softcap);\n",
        "",
        ("tests/test_attention_ops.py",),
    ),
    Mutation(
        "keys of old weights are read on",
        "transformers' continuous batching: a prefix cache that outlives an update",
        "fastppo/engine/engine.py",
        "if version != cache.version:",
        "if False:",
        PAGED,
    ),
    Mutation(
        "forks write to a block that they share",
        "a copy on write that does not copy",
        "fastppo/engine/blocks.py",
        "is_partial = held.length % BLOCK > 0",
        "is_partial = False",
        SCHEDULE,
    ),
    Mutation(
        "a window forgets a token too early",
        "off by one",
        "fastppo/engine/blocks.py",
        "hidden = max(0, position - window + 1)",
        "hidden = max(0, position - window + 2)",
        SCHEDULE,
    ),
    Mutation(
        "a critic's checkpointed layers are computed again with the policy's adapter",
        "PEFT's adapters are a state of the module, and a backward pass reads it",
        "fastppo/trainers/update.py",
        "            _value_loss(values, experience, minibatch, tokens, config).backward()\n",
        "            pass\n        _value_loss(values, experience, minibatch, tokens, config).backward()\n",
        CRITICS,
    ),
    Mutation(
        "values of the rollout stand for those of a critic of its own",
        "records believed that another network made",
        "fastppo/trainers/evaluate.py",
        'if critic != "head":',
        'if critic != "head" and rollout is None:',
        CRITICS,
    ),
    Mutation(
        "a part that was frozen is trained after its pass",
        "TRL 0.7.4: compute_reward_score changes flags",
        "fastppo/models/adapters.py",
        "            for parameter in frozen:\n                parameter.requires_grad_(False)",
        "            pass",
        SWITCHING,
    ),
    Mutation(
        "a scoring with dropout",
        "TRL 0.7.4: compute_reward_score in training mode",
        "fastppo/models/reward_adapter.py",
        "with evaluating(model), using_adapter",
        "with using_adapter",
        ("tests/test_reward_adapters.py",),
    ),
    Mutation(
        "a late reward is a reward of zero",
        "verl: 300 s, then 0.0",
        "fastppo/rewards/scoring.py",
        "                    self._report(*self._calls.pop(call), None)",
        "                    self._scores[self._calls[call][0], self._calls[call][1]] = 0.0\n"
        "                    self._report(*self._calls.pop(call), None)",
        REWARDS,
    ),
    Mutation(
        "a list of one score is broadcast",
        "TRL before July 2026",
        "fastppo/rewards/scores.py",
        "    if len(scores) != count:",
        "    scores = scores * count if len(scores) == 1 else scores\n    if len(scores) != count:",
        REWARDS,
    ),
    Mutation(
        "an infinite score is a score",
        "TRL 1.16: not checked",
        "fastppo/rewards/scores.py",
        "    if infinite:",
        "    if False:",
        REWARDS,
    ),
    Mutation(
        "an exception is a reward of zero",
        "open-r1: except: 0.0",
        "fastppo/rewards/scoring.py",
        "            raise error\n        self._scores[number, rows] = float(on_error)",
        "            on_error = 0.0\n        self._scores[number, rows] = float(on_error)",
        REWARDS,
    ),
    Mutation(
        "one candidate is split into its letters",
        "TRL 0.7.4: BestOfNSampler(sample_size=1)",
        "fastppo/rewards/best_of_n.py",
        "scores.view(-1, self.sample_size).tolist()",
        "scores.view(self.sample_size, -1).tolist()",
        ("tests/test_best_of_n.py",),
    ),
    Mutation(
        "a slot without the adapter's scale",
        "an oversight",
        "fastppo/engine/slots.py",
        "layer.lora_B[name].weight * layer.scaling[name]",
        "layer.lora_B[name].weight * 1",
        SWITCHING,
    ),
    Mutation(
        "what the last adapter left in a slot",
        "an oversight",
        "fastppo/engine/slots.py",
        "            torch._foreach_zero_(self.tensors)",
        "            pass",
        SWITCHING,
    ),
    Mutation(
        "a block's scale where it reaches into the next row",
        "bitsandbytes 0.50: dequantize_4bit on a CPU",
        "fastppo/models/bnb_linears.py",
        "if state.shape[-1] % state.blocksize == 0:",
        "if state.blocksize:",
        ("tests/test_four_bits.py",),
    ),
    Mutation(
        "one step for all rows",
        "bitsandbytes: a row's neighbours decide about it",
        "fastppo/ops/quantised.py",
        "wide.abs().amax(1, keepdim=True)",
        "wide.abs().amax()",
        ("tests/test_row_wise.py",),
    ),
    Mutation(
        "decoding on after an end",
        "engines that draw several tokens before they look",
        LOOP,
        "if (has_ended(loop, out.tokens)) return done + 1;",
        "",
        LOOPED,
    ),
    Mutation(
        "the same random number for every step of a loop",
        "an oversight",
        LOOP,
        "for (std::int64_t& place : places) ++place;",
        "",
        LOOPED,
    ),
    Mutation(
        "a least length that does not move on",
        "an oversight",
        LOOP,
        "loop.drawn[r] + done < loop.least",
        "loop.drawn[r] < loop.least",
        LOOPED,
    ),
    Mutation(
        "only one of the forbidden ids of a block",
        "an oversight",
        SAMPLING_H,
        "if (is_in(rows, *other, block)) left[*other - start] = -infinity();",
        "if (other == id) left[*other - start] = -infinity();",
        SAMPLING,
    ),
    Mutation(
        "room for a token of each row, whatever was reserved",
        "our own, until loops ended early",
        "fastppo/engine/schedule.py",
        "self.ledger.fits(self.ledger.missing(full, 1))",
        "self.ledger.fits([len(full)] * len(self.ledger.pools))",
        ("tests/test_schedule.py",),
    ),
]
