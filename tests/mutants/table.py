"""The mutants: one wrong line each, on the path that every run depends on, and the test that must fail for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        what: the fault in words.
        file: path under ``nemo_llm_feedback``.
        old: text that stands in the file exactly once.
        new: what the mutant has in its place.
        test: ``file::function`` under ``tests``.
    """

    what: str
    file: str
    old: str
    new: str
    test: str


CTC, LATTICE = "asr/likelihood/ctc.py", "asr/likelihood/lattice.py"
TEST_CTC, TEST_LATTICE = "asr/test_likelihood_ctc.py", "asr/test_likelihood_transducer.py"
OBJECTIVES, GROUPS = "training/objectives.py", "training/group_math.py"
TEST_OBJECTIVES, TEST_GROUPS = "training/test_objectives.py", "training/test_group_math.py"
STOPPING, HELD_OUT, GUARDS = (f"training/callbacks/{n}.py" for n in ("early_stopping", "held_out", "guards"))
MIXIN, LOSSES, RESUME = "training/mixin.py", "training/losses.py", "training/resume.py"
CHOICE, TRAINING = "training/test_choice_of_weights.py", "training/test_training.py"
BROKEN = "training/test_broken_judge.py"
RANKS, SURVIVAL = "training/test_distributed.py", "training/test_survival.py"
COUNTS, TEST_METRICS = "evaluation/error_counts.py", "evaluation/test_metrics.py"
RESCORING, TEST_RESCORING = "rescoring/scoring.py", "rescoring/test_rescoring.py"
EXTERNAL, TEST_EXTERNAL = "hypotheses/external.py", "hypotheses/test_external.py"
PROPOSALS, TEST_PROPOSALS = "hypotheses/proposals.py", "hypotheses/test_proposals.py"
REWARD, TEST_REWARD = "rewards/lm.py", "rewards/test_rewards.py"
_ZERO_WEIGHT = "torch.where(log_prob.isfinite(), grad.to(log_prob.dtype), torch.zeros_like(log_prob))"

MUTANTS = (
    # ------------------------------------------------ likelihood and its adjoint
    Mutant(
        "CTC: a repeated label needs no blank between",
        CTC,
        "repeats = trie.token == trie.token[parent]",
        "repeats = trie.token == -2",
        f"{TEST_CTC}::test_equals_the_sum_over_all_frame_strings",
    ),
    Mutant(
        "CTC: reads the last frame of the batch, not of the row",
        CTC,
        "end = lengths[trie.utterance[trie.leaf]]",
        "end = torch.full_like(trie.leaf, log_probs.shape[1])",
        f"{TEST_CTC}::test_equals_torch_ctc_loss_and_its_gradient",
    ),
    Mutant(
        "CTC: the adjoint stays by the share of entering",
        CTC,
        "torch.mul(label, staying, out=carried)",
        "torch.mul(label, entering, out=carried)",
        f"{TEST_CTC}::test_gradcheck",
    ),
    Mutant(
        "CTC: an infeasible hypothesis has a gradient",
        CTC,
        f"weight = {_ZERO_WEIGHT}",
        "weight = grad.to(log_prob.dtype) + log_prob * 0",
        f"{TEST_CTC}::test_infeasible_hypotheses_have_zero_gradient",
    ),
    Mutant(
        "CTC: a row with NaN in its frames has a score",
        CTC,
        'return log_prob.masked_fill(~row_ok[trie.utterance[trie.leaf]], float("nan"))',
        "return log_prob",
        f"{TEST_CTC}::test_padding_and_broken_rows_stay_where_they_are",
    ),
    Mutant(
        "transducer: a label arc comes from its own diagonal",
        LATTICE,
        "label_rows = shape.source_rows(tuple(move + 1 for move in shape.label_moves), device=device)",
        "label_rows = shape.source_rows(shape.label_moves, device=device)",
        f"{TEST_LATTICE}::test_equals_the_sum_over_all_paths",
    ),
    Mutant(
        "transducer: the adjoint leaves a label's flow at the child",
        LATTICE,
        "gamma[pad + d].index_add_(0, shape.parent, to_parent[pad + d])",
        "gamma[pad + d].add_(to_parent[pad + d])",
        f"{TEST_LATTICE}::test_gradcheck_of_encoder_prediction_network_and_joint",
    ),
    Mutant(
        "transducer: an infeasible hypothesis has a gradient",
        LATTICE,
        f"weight = {_ZERO_WEIGHT}",
        "weight = grad.to(log_prob.dtype) + log_prob * 0",
        f"{TEST_LATTICE}::test_hypothesis_too_long_for_durations_without_zero_has_zero_gradient",
    ),
    Mutant(
        "transducer: frames behind the end are read",
        LATTICE,
        "outside = (frame < 0) | (frame >= self.frames)",
        "outside = frame < 0",
        f"{TEST_LATTICE}::test_lattice_ignores_frames_behind_the_end",
    ),
    Mutant(
        "joint: the softmax is weighed by the blank's flow alone",
        "asr/likelihood/joint.py",
        "total = blank.index_add(1, cells.trie.parent.clamp_min(0), label)",
        "total = blank.clone()",
        f"{TEST_LATTICE}::test_gradcheck_of_encoder_prediction_network_and_joint",
    ),
    Mutant(
        "replay: KL(policy ‖ reference) in place of KL(reference ‖ policy)",
        "asr/likelihood/divergence.py",
        "return (reference.exp() * (reference - policy)).sum(-1)",
        "return (policy.exp() * (policy - reference)).sum(-1)",
        "asr/test_divergence.py::test_ctc_is_the_sum_of_its_frames_and_knows_no_padding",
    ),
    # ------------------------------------------------ prefix sharing
    Mutant(
        "trie: equal labels at a depth are one node, whatever stands before",
        "core/trie.py",
        "np.logical_and.accumulate(keyed[1:] == keyed[:-1], axis=1, out=shared[1:])",
        "shared[1:] = keyed[1:] == keyed[:-1]",
        "core/test_trie.py::test_nodes_are_the_distinct_prefixes_of_each_utterance",
    ),
    Mutant(
        "LLM: a node of a packed row does not see its ancestors",
        "llm/packing.py",
        "seen[place[node]] |= seen[place[parent]]",
        "seen[place[node]] |= False",
        "llm/test_llm_packing.py::test_masks_and_positions_of_a_small_trie",
    ),
    Mutant(
        "LLM: a text's score leaves out what its prefix costs",
        "llm/packing.py",
        "path[node] += path[parent]",
        "path[node] += 0 * path[parent]",
        "llm/test_llm_packing.py::test_every_way_of_sharing_gives_the_plain_scores",
    ),
    Mutant(
        "LLM: the end of the text is not scored",
        "llm/encoding.py",
        "        return (*ids[cut:], self.end_id)\n",
        "        return ids[cut:] or (self.end_id,)\n",
        "llm/test_llm.py::test_context_and_end_of_text_matter",
    ),
    # ------------------------------------------------ objectives
    Mutant(
        "distill: the two sides of the divergence are exchanged",
        OBJECTIVES,
        "group_kl(g.rewards / temperature, g.logp, g.valid)",
        "group_kl(g.logp, g.rewards / temperature, g.valid)",
        f"{TEST_OBJECTIVES}::test_distill_by_hand",
    ),
    Mutant(
        "mwer: sign",
        OBJECTIVES,
        "return _output(g, -(g.policy_grad * reward).sum(dim=1), {})",
        "return _output(g, (g.policy_grad * reward).sum(dim=1), {})",
        f"{TEST_OBJECTIVES}::test_mwer_by_hand",
    ),
    Mutant(
        "mwer: the baseline is not the mean under the weights",
        OBJECTIVES,
        "(rewards - (weights * rewards).sum(dim=1, keepdim=True))",
        "rewards",
        f"{TEST_OBJECTIVES}::test_mwer_kl_optimum_by_hand",
    ),
    Mutant(
        "reinforce: sign",
        OBJECTIVES,
        "return _output(g, -member_mean(advantage * g.logp, g.valid), {})",
        "return _output(g, member_mean(advantage * g.logp, g.valid), {})",
        f"{TEST_OBJECTIVES}::test_reinforce_by_hand",
    ),
    Mutant(
        "grpo: the larger of the clipped and the bare gain",
        OBJECTIVES,
        "torch.minimum(ratio * advantage, clipped)",
        "torch.maximum(ratio * advantage, clipped)",
        f"{TEST_OBJECTIVES}::test_grpo_clips_only_moves_that_went_far_enough",
    ),
    Mutant(
        "dpo: the worse member is preferred",
        OBJECTIVES,
        "F.softplus(-beta * margin)",
        "F.softplus(beta * margin)",
        f"{TEST_OBJECTIVES}::test_dpo_by_hand_and_is_the_logistic_loss",
    ),
    Mutant(
        "dpo: the reference is clamped at −50 nat",
        OBJECTIVES,
        "else g.logp - g.ref_logp\n",
        "else g.logp - g.ref_logp.clamp(min=-50)\n",
        f"{CHOICE}::test_dpo_reads_references_of_any_depth",
    ),
    Mutant(
        "self-training: unsure labels are learned",
        OBJECTIVES,
        "usable & (confidence >= min_confidence)",
        "usable",
        f"{TEST_OBJECTIVES}::test_self_training_confidence_filter",
    ),
    Mutant(
        "group mass: sign",
        OBJECTIVES,
        "return _output(g, -log_mass(g.logp, g.valid), {})",
        "return _output(g, log_mass(g.logp, g.valid), {})",
        f"{TEST_OBJECTIVES}::test_regularisers_by_hand",
    ),
    Mutant(
        "the loss is a mean over all groups, not over those with signal",
        OBJECTIVES,
        "loss.masked_fill(~g.kept, 0.0).sum() / groups.clamp(min=1), metrics",
        "loss.masked_fill(~g.kept, 0.0).mean(), metrics",
        f"{TEST_OBJECTIVES}::test_loss_is_the_mean_over_groups_with_signal",
    ),
    Mutant(
        "baseline: the member itself is in it",
        GROUPS,
        "return centred(rewards, mask) * count / (count - 1).clamp(min=1)",
        "return centred(rewards, mask)",
        f"{TEST_GROUPS}::test_leave_one_out_excludes_the_member_itself",
    ),
    Mutant(
        "baseline: padding counts as members",
        GROUPS,
        "filled.sum(dim=1, keepdim=True) / count)",
        "filled.sum(dim=1, keepdim=True) / rewards.shape[1])",
        f"{TEST_OBJECTIVES}::test_padding_changes_nothing",
    ),
    Mutant(
        "a group that was judged in part is learned from",
        GROUPS,
        "return judged & (mask.sum(dim=1) >= 2)",
        "return (mask.sum(dim=1) >= 2)",
        f"{TEST_GROUPS}::test_signal",
    ),
    Mutant(
        "members of −inf count",
        GROUPS,
        "return self.mask.to(self.logp.device) & ~impossible",
        "return self.mask.to(self.logp.device) | impossible & False",
        f"{TEST_OBJECTIVES}::test_infeasible_members_count_as_padding",
    ),
    Mutant(
        "augmented self-training ignores min_confidence",
        "training/supervision.py",
        "if confidences[-1] >= config.min_confidence and members[best].tokens:",
        "if members[best].tokens:",
        f"{CHOICE}::test_augmented_self_training_learns_confident_labels_only",
    ),
    # ------------------------------------------------ rewards, groups, deduplication
    Mutant(
        "reward: the length is taken off",
        REWARD,
        "+ self._beta * length",
        "- self._beta * length",
        f"{TEST_REWARD}::test_values_follow_the_formula",
    ),
    Mutant(
        "reward: pmi adds the score without context",
        REWARD,
        "return logp - scores[_NO_CONTEXT, text].logp",
        "return logp + scores[_NO_CONTEXT, text].logp",
        f"{TEST_REWARD}::test_values_follow_the_formula",
    ),
    Mutant(
        "reward: token normalisation divides by words",
        REWARD,
        "return logp / num_tokens",
        "return logp / max(1, text_length(text))",
        f"{TEST_REWARD}::test_values_follow_the_formula",
    ),
    Mutant(
        "reward: what cannot be judged is worth 0",
        REWARD,
        "return value.masked_fill(~judged, math.nan).float()",
        "return value.masked_fill(~judged, 0.0).float()",
        f"{TEST_REWARD}::test_what_cannot_be_judged_is_nan_in_values_and_parts",
    ),
    Mutant(
        "the cache keeps −inf",
        "rewards/asking.py",
        "if math.isfinite(logp)]",
        "if not math.isnan(logp)]",
        f"{CHOICE}::test_a_score_that_is_not_finite_is_not_kept",
    ),
    Mutant(
        "alpha: the LLM is weighed up, not down, by its spread",
        "hypotheses/reward_scale.py",
        "settings.spread_factor * asr / llm",
        "settings.spread_factor * llm / asr",
        "cli/test_score_command.py::test_without_labels_the_spread_sets_alpha",
    ),
    Mutant(
        "searches: a captured one serves another list of terms",
        "asr/searches.py",
        "if place not in self._kept or self._kept[place][0] != key:",
        "if place not in self._kept:",
        "asr/test_searches.py::test_captured_searches_find_the_same_and_never_outlive_the_weights",
    ),
    Mutant(
        "members: the worse-scored spelling is kept",
        PROPOSALS,
        "better = candidate if candidate.logp > known.logp else known",
        "better = candidate if candidate.logp < known.logp else known",
        f"{TEST_PROPOSALS}::test_members_are_distinct_after_normalisation_and_the_better_spelling_is_kept",
    ),
    Mutant(
        "members: samples lose their multiplicity",
        PROPOSALS,
        "    if not distinct:\n",
        "    if False:\n",
        f"{TEST_PROPOSALS}::test_members_are_distinct_after_normalisation_and_the_better_spelling_is_kept",
    ),
    Mutant(
        "members: infeasible ones stay",
        PROPOSALS,
        "if c.logp > -math.inf] or list",
        "if c.logp >= -math.inf] or list",
        f"{TEST_PROPOSALS}::test_members_are_distinct_after_normalisation_and_the_better_spelling_is_kept",
    ),
    Mutant(
        "groups: the sampler's log p is overwritten at every use",
        "hypotheses/nbest.py",
        "torch.where(before.isnan() & self.mask, now.detach().float().cpu(), before)",
        "torch.where(self.mask, now.detach().float().cpu(), before)",
        f"{CHOICE}::test_members_remember_the_log_p_of_their_first_use",
    ),
    # ------------------------------------------------ metrics and rescoring
    Mutant(
        "entities: a word inserted before the entity is an error of it",
        COUNTS,
        "within[start + 1 : end] = True",
        "within[start:end] = True",
        f"{TEST_METRICS}::test_entity_counts",
    ),
    Mutant(
        "entities: recall is lost by a word inserted before the entity",
        COUNTS,
        "inserted[start + 1 : end].any()",
        "inserted[start:end].any()",
        f"{TEST_METRICS}::test_entity_counts",
    ),
    Mutant(
        "false alarms: terms that were said count",
        COUNTS,
        "(n, max(0, n - len(occurrences(ref, list(p)))))",
        "(n, n)",
        f"{TEST_METRICS}::test_false_alarms",
    ),
    Mutant(
        "oracle: the worst member",
        "evaluation/metrics.py",
        "best.append(min(members,",
        "best.append(max(members,",
        f"{TEST_METRICS}::test_oracle",
    ),
    Mutant(
        "rescoring: the length is taken off",
        RESCORING,
        "score = asr + beta * length",
        "score = asr - beta * length",
        f"{TEST_RESCORING}::test_the_score_is_exact_log_p_plus_weighted_reward_and_length",
    ),
    Mutant(
        "rescoring: alpha is not used",
        RESCORING,
        "score = value if weighed else score + alpha * value",
        "score = value if weighed else score + value",
        f"{TEST_RESCORING}::test_the_score_is_exact_log_p_plus_weighted_reward_and_length",
    ),
    Mutant(
        "rescoring: a reward that weighs log p itself is added to it",
        RESCORING,
        'weighed = self._is_whole or "asr" in output.parts or _weighs_asr(self.reward)',
        "weighed = False",
        f"{TEST_RESCORING}::test_an_llm_reward_gives_the_one_parameterisation",
    ),
    Mutant(
        "rescoring: a member that cannot be judged may win",
        RESCORING,
        "judged = not math.isnan(member.score)",
        "judged = True",
        f"{TEST_RESCORING}::test_a_member_that_cannot_be_judged_loses_and_log_p_decides_where_none_can",
    ),
    # ------------------------------------------------ ranks and exports
    Mutant(
        "ranks: a rank with few rows counts as much as one with many",
        LOSSES,
        "return len(self.all) * self.terms[name].count / total if total else 0.0",
        "return 1.0 if total else 0.0",
        f"{RANKS}::test_shares_make_the_mean_of_ranks_the_mean_of_items",
    ),
    Mutant(
        "ranks: metrics are joined without their counts",
        LOSSES,
        "out[name] = sum(value * count for value, count in pairs) / total if total else math.nan",
        "out[name] = sum(value for value, _ in pairs) / len(pairs) if pairs else math.nan",
        f"{RANKS}::test_metrics_are_joined_by_their_counts",
    ),
    Mutant(
        "the exported .nemo keeps the context",
        "asr/checkpoints.py",
        '"proposals", "reward", "llm", "context"):',
        '"proposals", "reward", "llm"):',
        f"{CHOICE}::test_the_export_keeps_no_section_of_ours",
    ),
    Mutant(
        "the exported .nemo lacks LoRA's update",
        "asr/lora.py",
        "(value + update).to(value.dtype)",
        "value",
        f"{TRAINING}::test_lora_is_merged_into_stock_names_and_equals_the_trained_model",
    ),
    # ------------------------------------------------ guards and the choice of weights
    Mutant(
        "held-out gain: sign",
        HELD_OUT,
        "values[:, 0] - values[:, 1]",
        "values[:, 1] - values[:, 0]",
        f"{CHOICE}::test_the_gain_is_new_minus_old_over_what_can_be_judged",
    ),
    Mutant(
        "held-out gain: 0 where nothing could be judged",
        HELD_OUT,
        "unknown = bool(changed) and all(math.isnan(gain) for gain in changed)",
        "unknown = not found",
        f"{CHOICE}::test_the_gain_is_new_minus_old_over_what_can_be_judged",
    ),
    Mutant(
        "held-out rows are trained on",
        "data/staging.py",
        "if not row.unlabeled or row.utterance not in out]",
        "if row not in ()]",
        f"{CHOICE}::test_held_out_rows_are_not_trained_on",
    ),
    Mutant(
        "everyday speech of another language moves weights",
        HELD_OUT,
        "(known or self.start_wer < _OTHER_LANGUAGE)",
        "(known or self.start_wer > 0)",
        "training/test_general_speech.py::test_the_update_goes_back_to_what_everyday_speech_bears",
    ),
    Mutant(
        "guards: transcripts may vanish",
        GUARDS,
        "if not 1 / limits.max_length_ratio <=",
        "if not 0 <=",
        f"{CHOICE}::test_a_guard_trips_beyond_its_limit_and_not_at_it",
    ),
    Mutant(
        "guards: twice the limit is borne",
        GUARDS,
        "if value > limit:",
        "if value > 2 * limit:",
        f"{CHOICE}::test_a_guard_trips_beyond_its_limit_and_not_at_it",
    ),
    Mutant(
        "guards: the guard set's WER stops a run that could be mended",
        GUARDS,
        "if limits.interpolation is not None and metrics.wer_rise",
        "if metrics.wer_rise",
        f"{CHOICE}::test_the_guard_sets_wer_stops_a_run_only_where_nothing_can_mend_it",
    ),
    Mutant(
        "the worst weights are kept",
        STOPPING,
        "best = max(over_this_teacher",
        "best = min(over_this_teacher",
        f"{CHOICE}::test_the_best_measurement_is_kept_and_patience_stops_the_run",
    ),
    Mutant(
        "what chance may turn around is not kept",
        STOPPING,
        "standard_errors=self._limits.standard_errors",
        "standard_errors=0.0",
        f"{CHOICE}::test_of_gains_that_chance_may_turn_around_the_latest_weights_are_kept",
    ),
    Mutant(
        "the start is exported",
        STOPPING,
        "put_back(pl_module, self._best or self._start)",
        "put_back(pl_module, self._start)",
        f"{CHOICE}::test_the_best_measurement_is_kept_and_patience_stops_the_run",
    ),
    Mutant(
        "patience never stops a run",
        STOPPING,
        "else self._since + 1",
        "else 0",
        f"{CHOICE}::test_the_best_measurement_is_kept_and_patience_stops_the_run",
    ),
    Mutant(
        "a rise does not start patience anew",
        STOPPING,
        "self._since = 0 if rises or",
        "self._since = 0 if",
        f"{CHOICE}::test_a_rise_starts_patience_anew",
    ),
    Mutant(
        "interpolation: the share that no longer fits",
        STOPPING,
        "return fits / 10",
        "return fails / 10",
        f"{TRAINING}::test_the_update_is_interpolated_down_to_what_the_guard_set_bears",
    ),
    Mutant(
        "interpolation: from the wrong end",
        "training/weights.py",
        "start[name] + share * (value - start[name])",
        "value + share * (start[name] - value)",
        f"{TRAINING}::test_weights_are_kept_put_back_interpolated_and_averaged",
    ),
    # ------------------------------------------------ resumption and faults
    Mutant(
        "a resumed run forgets the best gain",
        STOPPING,
        'self.history = [HeldOutMetrics(**found) for found in state_dict["history"]]',
        "self.history = []",
        f"{CHOICE}::test_a_resumed_run_remembers_the_best_gain_its_weights_and_its_patience",
    ),
    Mutant(
        "a resumed run forgets its patience",
        STOPPING,
        'self._since = state_dict["best_step"], state_dict["since"]',
        'self._since = state_dict["best_step"], 0',
        f"{CHOICE}::test_a_resumed_run_remembers_the_best_gain_its_weights_and_its_patience",
    ),
    Mutant(
        "a resumed run forgets the best weights",
        STOPPING,
        'self._best = state_dict["best"]',
        "self._best = None",
        f"{CHOICE}::test_a_resumed_run_remembers_the_best_gain_its_weights_and_its_patience",
    ),
    Mutant(
        "best weights that an older checkpoint needs are removed",
        "training/weights.py",
        "max((k for k in kept if k <= last), default=step)",
        "max(kept)",
        f"{CHOICE}::test_the_best_weights_are_one_file_beside_the_checkpoints_that_have_them",
    ),
    Mutant(
        "best weights of a checkpoint that is a step older than its name are removed",
        "training/weights.py",
        "for late in (0, 1)",
        "for late in (0,)",
        f"{CHOICE}::test_best_weights_stay_for_a_checkpoint_that_is_of_the_step_after_its_name",
    ),
    Mutant(
        "a resumed run forgets the kept groups",
        MIXIN,
        "self._feedback.load_nbest(self._resumed, rank=self.global_rank)",
        "pass",
        f"{CHOICE}::test_a_resumed_run_goes_on_with_the_hypotheses_that_it_had",
    ),
    Mutant(
        "a resumed run takes the oldest checkpoint",
        "cli/jobs/run_choice.py",
        "(whole[-1] if whole else None)",
        "(whole[0] if whole else None)",
        f"{CHOICE}::test_a_resumed_run_goes_on_from_the_newest_checkpoint",
    ),
    Mutant(
        "a resumed run draws other random numbers",
        RESUME,
        'torch.set_rng_state(states["torch"].cpu())',
        "pass",
        f"{SURVIVAL}::test_random_states_come_back",
    ),
    Mutant(
        "a resumed run repeats the batch of its checkpoint",
        RESUME,
        'progress[part]["completed"] = progress[part]["processed"]',
        "pass",
        f"{SURVIVAL}::test_the_batch_of_the_checkpoint_counts_as_done",
    ),
    Mutant(
        "the count of steps that are not finite is never reset",
        MIXIN,
        "            self.nonfinite_steps = 0\n",
        "",
        f"{CHOICE}::test_a_step_that_is_not_finite_moves_nothing_names_its_utterances_and_a_finite_one_starts_the_count_anew",
    ),
    Mutant(
        "a step that is not finite has a gradient of zeros, and Adam's momentum moves the weights",
        MIXIN,
        "parameter.grad = None",
        "parameter.grad = torch.zeros_like(parameter)",
        f"{CHOICE}::test_a_step_that_is_not_finite_moves_nothing_names_its_utterances_and_a_finite_one_starts_the_count_anew",
    ),
    Mutant(
        "the rate trial's loss is NaN by one utterance that cannot be scored",
        "training/callbacks/lr_search.py",
        "bad = torch.stack([scores.isnan().any(1)",
        "bad = torch.stack([scores.isnan().all(1) & False",
        f"{CHOICE}::test_one_utterance_that_cannot_be_scored_does_not_make_the_held_out_loss_nan",
    ),
    Mutant(
        "ranks: in the trial of rates each learns from its rows alone",
        "training/callbacks/lr_search.py",
        "        average_gradients(model)\n",
        "        pass\n",
        f"{RANKS}::test_two_ranks_share_trial_and_measurements_and_find_what_one_process_finds",
    ),
    Mutant(
        "memory: the LLM stays where it works between the steps",
        "training/state.py",
        "            self.scorer.unload()\n",
        "            pass\n",
        f"{TRAINING}::test_measurements_and_the_trial_leave_no_llm_in_memory_that_works_between_the_steps",
    ),
    # ------------------------------------------------ a judge that breaks, and what it is shown
    Mutant(
        "the mass term holds groups that nothing judges",
        LOSSES,
        "groups._replace(mask=groups.mask & judged)",
        "groups",
        f"{BROKEN}::test_below_the_limit_nothing_moves_the_weights_and_the_gain_is_not_zero_but_unknown",
    ),
    Mutant(
        "a step with nothing to learn moves the weights by Adam's momentum",
        MIXIN,
        "if float(norm) > 0:",
        "if float(norm) >= 0:",
        f"{BROKEN}::test_below_the_limit_nothing_moves_the_weights_and_the_gain_is_not_zero_but_unknown",
    ),
    Mutant(
        "groups whose LLM gives NaN are not counted",
        "rewards/asking.py",
        "now and not all(map(math.isfinite, row))",
        "False",
        "rewards/test_failed_groups.py::"
        "test_groups_without_a_score_are_counted_as_groups_and_stop_the_run_past_a_fifth",
    ),
    Mutant(
        "a chat template writes the date of the day, not the run's",
        "llm/chat.py",
        "_TODAY.get() or ",
        "",
        f"{SURVIVAL}::test_a_resumed_run_keeps_the_date_that_its_chat_template_writes",
    ),
    Mutant(
        "a resumed run writes the date of the day into its prompts",
        "training/setup.py",
        '(known or {}).get("chat_date") or ',
        "",
        f"{SURVIVAL}::test_a_resumed_run_keeps_the_date_that_its_chat_template_writes",
    ),
    # ------------------------------------------------ other recognisers
    Mutant(
        "one source's many texts come before the best of the others",
        EXTERNAL,
        "listed = [(form, text.source) for rank in ranks for text in rank if text",
        "listed = [(form, text.source) for text in texts",
        f"{TEST_EXTERNAL}::test_many_texts_are_bounded_per_source_and_in_all_and_each_sources_best_comes_first",
    ),
    Mutant(
        "a member has the sources of its first spelling alone",
        PROPOSALS,
        "dict.fromkeys((known.source, *known.also, candidate.source, *candidate.also))",
        "dict.fromkeys((known.source, *known.also))",
        f"{TEST_PROPOSALS}::test_a_member_has_the_sources_of_all_its_spellings_the_first_first",
    ),
    Mutant(
        "a text that greedy and another recogniser propose is greedy's alone",
        PROPOSALS,
        "names = dict.fromkeys((known.source, *known.also, new.source, *new.also))",
        "names = dict.fromkeys((known.source, *known.also))",
        f"{TEST_EXTERNAL}::test_a_member_that_beam_and_another_recogniser_propose_is_one_and_has_both_names",
    ),
    Mutant(
        "self-training on a source learns the frozen model's favourite",
        "training/supervision.py",
        "if not config.source or config.source in member.sources]",
        "]",
        "training/test_other_recognisers.py::test_self_training_on_a_source_learns_its_text_and_skips_rows_without_one",
    ),
    Mutant(
        "a second join keeps what the source gave before",
        "cli/jobs/hypotheses.py",
        "for given, text in known if text.source not in sources]",
        "for given, text in known]",
        "cli/test_hypotheses.py::test_a_second_join_replaces_the_sources_texts_and_keeps_the_others",
    ),
)
