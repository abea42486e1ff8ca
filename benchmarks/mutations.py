"""Plants mistakes in a copy of the package, and shows which test notices each of them.

    python benchmarks/mutations.py [--only=NAME ...] [--mode=tests|verify]

A mistake replaces one text of one file. The text must occur exactly once in the file, so a mistake
whose code has moved stops the program with an error. First, all named tests must pass without a
mistake. Then each mistake is planted alone, and the tests that are named with it run until one
fails. A row of the printed table has the mistake, its file, the first test that fails and the
seconds of this run. The exit status is 1 if a mistake is not noticed.

Of the named tests, only those run that plain ``pytest`` runs, which are not marked slow. With
``--mode=verify``, ``python -m sbml.main --mode=verify`` takes the place of the tests, and the rows
of its table that fail are named.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
QUICK = "not slow and not notebook and not frameworks"  # pytest's marker expression
LIMIT = 1200  # seconds for one run of tests, or of --mode=verify


class Mistake(NamedTuple):
    """A mistake: ``find``, which occurs once in ``file``, becomes ``wrong``.

    ``tests`` are arguments of pytest, relative to the folder ``tests``.
    """

    name: str
    file: str
    find: str
    wrong: str
    tests: tuple[str, ...]


MISTAKES = (
    # Formulas.
    Mistake(
        "codec: reverse mean times 0.9",
        "sbml/codec/chain.py",
        "self.drops[i - 1] * noise",
        "self.drops[i - 1] * 0.9 * noise",
        ("test_codec.py::test_the_reverse_step_is_the_true_one_where_the_noise_is_known",),
    ),
    Mistake(
        "sample_logp: sign of the correction",
        "sbml/likelihood/flow.py",
        "correction=sign * found.correction",
        "correction=found.correction",
        ("test_distribution.py::test_samples_and_their_log_p_by_one_solve",),
    ),
    Mistake(
        "importance: log K dropped",
        "sbml/density/estimators/ode.py",
        "average(log_weights) + math.log(len(weights))",
        "average(log_weights)",
        ("test_estimators.py::test_k_draws_are_the_log_of_their_mean_weight",),
    ),
    Mistake(
        "warp: weight dropped",
        "sbml/sdes/times.py",
        "1 / (bins * mass[k])",
        "jnp.ones_like(v)",
        ("test_times_density.py::test_warped_points_integrate_over_v",),
    ),
    Mistake(
        "likelihood weighting halved",
        "sbml/losses.py",
        "return sde.rate(t) if",
        "return sde.rate(t) / 2 if",
        ("test_losses.py::test_weights",),
    ),
    Mistake(
        "noise of two draws not halved",
        "sbml/statistics/intervals.py",
        "float(np.mean(squares)) / (2 * n)",
        "float(np.mean(squares)) / n",
        ("test_intervals.py::test_noise_of_a_repeated_draw",),
    ),
    Mistake(
        "codec: reverse std without the ratio",
        "sbml/codec/chain.py",
        "np.sqrt(self.drops * self.ratios)",
        "np.sqrt(self.drops)",
        (
            "test_codec.py::test_with_the_best_variances_few_steps_lose_nothing_on_isotropic_normal_data",
        ),
    ),
    Mistake(
        "ODE: log q of the dequantizer dropped",
        "sbml/density/estimators/ode.py",
        '"dequantization": log_q}, result',
        '"dequantization": 0 * log_q}, result',
        ("test_estimators.py::test_the_odes_row_is_the_librarys_likelihood",),
    ),
    Mistake(
        "prior KL: r not squared",
        "sbml/likelihood/bound.py",
        "(std / sde.prior_std) ** 2",
        "(std / sde.prior_std)",
        ("test_bound.py::test_prior_is_the_kl_by_quadrature",),
    ),
    Mistake(
        "prior: log of its deviation dropped",
        "sbml/sdes/base.py",
        "z.size * (log_std + 0.5",
        "z.size * (0 * log_std + 0.5",
        ("test_sdes.py::test_prior",),
    ),
    Mistake(
        "bound: reconstruction doubled",
        "sbml/likelihood/bound.py",
        "reconstruction = diffusion_dsm(",
        "reconstruction = 2 * diffusion_dsm(",
        ("test_bound.py::test_reconstruction_is_the_gaussian_decoder",),
    ),
    Mistake(
        "dequantizer at noise: sign of d log alpha",
        "sbml/density/estimators/base.py",
        "nats -= math.prod(shape)",
        "nats += math.prod(shape)",
        ("test_estimators.py::test_the_odes_row_is_the_librarys_likelihood",),
    ),
    Mistake(
        "bound in steps: weight 1 - exp",
        "sbml/likelihood/bound.py",
        "0.5 * jnp.expm1(log_snr[:-1] - log_snr[1:])",
        "-0.5 * jnp.expm1(log_snr[1:] - log_snr[:-1])",
        ("test_codec.py::test_the_bound_of_an_evaluation_is_that_of_the_chain_in_the_same_steps",),
    ),
    Mistake(
        "log_prob: sign of the transform",
        "sbml/density/distribution.py",
        "jnp.asarray(logp + log_det, logp.dtype).reshape(batch)",
        "jnp.asarray(logp - log_det, logp.dtype).reshape(batch)",
        ("test_distribution.py::test_a_change_of_variables_keeps_the_mass",),
    ),
    Mistake(
        "sample_and_log_prob: sign of the transform",
        "sbml/density/distribution.py",
        "return y, jnp.asarray(found + log_det, found.dtype)",
        "return y, jnp.asarray(found - log_det, found.dtype)",
        ("test_distribution.py::test_a_change_of_variables_keeps_the_mass",),
    ),
    Mistake(
        "classify: prior ignored",
        "sbml/density/posterior.py",
        "log_softmax(t + log_prior, axis=1)",
        "log_softmax(t, axis=1)",
        ("test_distribution.py::test_the_posterior_of_a_condition_is_that_of_bayes",),
    ),
    Mistake(
        "log Z: sum for mean",
        "sbml/density/posterior.py",
        "(math.log(mean) if mean > 0",
        "(math.log(mean * n) if mean > 0",
        ("test_distribution.py::test_importance_weights_give_the_normaliser",),
    ),
    Mistake(
        "log Z: standard error with n for its root",
        "sbml/density/posterior.py",
        "/ (mean * math.sqrt(n)) if",
        "/ (mean * n) if",
        ("test_distribution.py::test_importance_weights_give_the_normaliser",),
    ),
    Mistake(
        "table: sign of the Jacobian",
        "sbml/data/table.py",
        "slopes.sum(axis=-1) - _of",
        "slopes.sum(axis=-1) + _of",
        ("test_table.py::test_the_change_of_variables_is_exact",),
    ),
    Mistake(
        "conditional score ignores its condition",
        "sbml/core/types.py",
        "score(x, t, key, condition)",
        "score(x, t, key, condition * 0)",
        ("test_distribution.py::test_a_condition_is_for_all_examples_or_for_each",),
    ),
    Mistake(
        "control in steps: square of l dropped",
        "sbml/likelihood/bound.py",
        "(variances**2 + v * c2[None])",
        "(v * c2[None])",
        ("test_distribution.py::test_the_bound_in_discrete_time",),
    ),
    Mistake(
        "bound: integral of the control without its coefficients",
        "sbml/likelihood/bound.py",
        "0.5 * jnp.sum(self.coefficients * jnp.sum(",
        "0.5 * jnp.sum(1.0 * jnp.sum(",
        ("test_bound.py::test_a_coefficient_at_each_noise_level_leaves_the_expectation",),
    ),
    Mistake(
        "bound: expectation of the control at eps doubled",
        "sbml/likelihood/bound.py",
        "jnp.full((1,), 0.5, x.dtype)",
        "jnp.full((1,), 1.0, x.dtype)",
        ("test_bound.py::test_the_control_leaves_the_expectation_of_the_reconstruction",),
    ),
    Mistake(
        "lattice not permuted",
        "sbml/sdes/times.py",
        "(jax.random.permutation(order, n) + shift)",
        "(jnp.arange(n) + shift)",
        ("test_times.py::test_each_point_is_uniform",),
    ),
    Mistake(
        "bound: sign of the transform",
        "sbml/density/density.py",
        'found.with_term("transform", -log_det)',
        'found.with_term("transform", log_det)',
        ("test_distribution.py::test_a_change_of_variables_keeps_the_mass",),
    ),
    Mistake(
        "sweeps: standard error with R for its root",
        "sbml/density/measurement.py",
        "ddof=1)) / math.sqrt(len(means))",
        "ddof=1)) / len(means)",
        ("test_density.py::test_the_bound_is_the_librarys_mean_over_sweeps_of_new_times",),
    ),
    Mistake(
        "probes are all ones",
        "sbml/score/divergence.py",
        "jax.random.rademacher(key, (1, *shape), dtype=float)",
        "jnp.ones((1, *shape))",
        ("test_divergence.py::test_probes_have_the_distribution_they_are_named_after",),
    ),
    Mistake(
        "solver's error times 0.1",
        "sbml/density/measurement.py",
        "mean_interval(values - exact)",
        "mean_interval(0.1 * (values - exact))",
        ("test_solver_error.py::test_converged_is_right_for_every_tolerance",),
    ),
    Mistake(
        "prior error: mean dropped",
        "sbml/likelihood/flow.py",
        "np.sum((alpha * mean) ** 2 + excess",
        "np.sum(0 * (alpha * mean) ** 2 + excess",
        (
            "test_prior_mismatch.py::test_bits_per_dim_have_the_prior_error_of_the_dequantized_integers",
        ),
    ),
    Mistake(
        "table: baseline without the Jacobian",
        "sbml/program/evaluation/densities.py",
        "each.logp(z) + rows.log_det for",
        "each.logp(z) for",
        ("test_table.py::test_the_number_is_that_of_a_known_density",),
    ),
    Mistake(
        "compress: initial bits counted twice",
        "sbml/program/evaluation/coding.py",
        "(payload - initial) / dims",
        "(payload - 2 * initial) / dims",
        (
            "test_compress.py::test_the_images_of_a_split_come_back_and_the_parts_of_the_length_add_up",
        ),
    ),
    Mistake(
        "codec: bits not scrambled",
        "sbml/codec/bits_back.py",
        "((upper + pad) % 2**PRECISION)",
        "((upper + 0 * pad) % 2**PRECISION)",
        ("test_codec.py::test_scrambled_bits_are_independent_of_what_was_pushed",),
    ),
    # Samplers, their gap, and importance weights.
    Mistake(
        "sampler: sign of the stretch",
        "sbml/samplers/density.py",
        "jnp.sum(log_dets) - z.size * jnp.log(stretch)",
        "jnp.sum(log_dets) + z.size * jnp.log(stretch)",
        ("test_sampler_density.py::test_samples_have_the_density_of_the_affine_map",),
    ),
    Mistake(
        "path: sign of the stretch",
        "sbml/samplers/density.py",
        "+ x[0].size * jnp.log(stretch)",
        "- x[0].size * jnp.log(stretch)",
        ("test_sampler_density.py::test_paths_have_the_densities_of_their_normal_steps",),
    ),
    Mistake(
        "folds: only the last step is tested",
        "sbml/samplers/density.py",
        "    n = len(found.signs)\n",
        "    n, found = len(found.signs), jax.tree.map(lambda leaf: leaf[..., -1:], found)\n",
        ("test_sampler_density.py::test_samplers_without_a_density_are_refused",),
    ),
    Mistake(
        "path: sign of the transform",
        "sbml/density/distribution.py",
        "jnp.asarray(self._data(x)[1], found.prior.dtype)",
        "jnp.asarray(-self._data(x)[1], found.prior.dtype)",
        ("test_sampler_density.py::test_paths_along_any_leading_axes",),
    ),
    Mistake(
        "path_log_prob: condition 0",
        "sbml/density/distribution.py",
        "_path_log_prob(self, x, condition=condition,",
        "_path_log_prob(self, x, condition=jax.tree.map(jnp.zeros_like, condition),",
        ("test_sampler_density.py::test_paths_along_any_leading_axes",),
    ),
    Mistake(
        "path_log_prob: times of the SDE's smallest time",
        "sbml/density/distribution.py",
        "how.sampler.known_times(how.sde, how.eps)",
        "how.sampler.known_times(how.sde, how.sde.smallest_time)",
        ("test_sampler_density.py::test_paths_along_any_leading_axes",),
    ),
    Mistake(
        "gap: the ODE has condition 0",
        "sbml/density/density.py",
        "-exact.logp(np.asarray(x), condition)",
        "-exact.logp(np.asarray(x), None if condition is None else 0.0 * condition)",
        (
            "test_sampler_density.py::test_the_gap_is_that_to_the_ode_of_the_same_condition_without_noise",
        ),
    ),
    Mistake(
        "gap: the ODE has random probes",
        "sbml/density/density.py",
        'exact = dataclasses.replace(self, trace=Trace("exact"))',
        "exact = self",
        (
            "test_sampler_density.py::test_the_gap_is_that_to_the_ode_of_the_same_condition_without_noise",
        ),
    ),
    Mistake(
        "gap in words: nats",
        "sbml/program/evaluation/samples.py",
        "bits.nats_to_bits(v, shape) for v",
        "v for v",
        ("test_sample.py::test_a_gap_is_said_in_bits_per_dimension",),
    ),
    Mistake(
        "importance: sum / max for the effective sample size",
        "sbml/density/posterior.py",
        "np.sum(weights) ** 2 / np.sum(weights**2)",
        "np.sum(weights) / np.max(weights)",
        ("test_distribution.py::test_lost_examples_are_named_and_large_differences_are_kept",),
    ),
    Mistake(
        "importance: walks of one step",
        "sbml/density/density.py",
        "WALK = 100  #",
        "WALK = 1  #",
        ("test_tails.py::test_the_walks_of_importance_draw_from_the_target",),
    ),
    Mistake(
        "importance: a mark that is ten times laxer",
        "sbml/density/posterior.py",
        "or not self.missing <= ",
        "or not self.missing / 10 <= ",
        (
            "test_tails.py::test_unmarked_intervals_of_log_z_contain_it_and_bounded_weights_are_not_marked",
        ),
    ),
    Mistake(
        "joint: prior divided out n times",
        "sbml/density/density.py",
        "each.sum() - (n - 1) * jnp.where(",
        "each.sum() - n * jnp.where(",
        ("test_importance.py::test_the_posterior_of_several_observations_is_the_conjugate_one",),
    ),
    Mistake(
        "forecast: excesses over the threshold half as large",
        "sbml/density/posterior.py",
        "largest = body[-1] + scale *",
        "largest = body[-1] + 0.5 * scale *",
        (
            "test_importance.py::test_the_forecast_of_the_effective_sample_size_holds_for_heavy_tails",
        ),
    ),
    Mistake(
        "importance: stops at half of target_ess",
        "sbml/density/density.py",
        "effective_size(weights) >= target_ess:",
        "effective_size(weights) >= 0.5 * target_ess:",
        ("test_importance.py::test_samples_are_drawn_until_they_suffice",),
    ),
    Mistake(
        "window: one step more has noise",
        "sbml/samplers/_grid.py",
        "noisy = (self.first <= carry) & (carry < self.last)",
        "noisy = (self.first <= carry) & (carry <= self.last)",
        (
            "test_sampler_density.py::test_a_window_has_the_noise_and_the_densities_of_its_steps_only",
        ),
    ),
    Mistake(
        "flow policy: half the noise",
        "sbml/samplers/one_step.py",
        "return self.a * jnp.sqrt(sde.std(s)",
        "return 0.5 * self.a * jnp.sqrt(sde.std(s)",
        ("test_sampler_density.py::test_flow_policies_have_the_published_step",),
    ),
    Mistake(
        "flow map: a stretch that its grid does not have",
        "sbml/samplers/flow_map.py",
        "        return 1.0\n",
        "        return 2.0\n",
        ("test_sampler_density.py::test_the_exact_map_of_a_gaussian_has_its_density",),
    ),
    Mistake(
        "bound of integers: one level too many",
        "sbml/density/density.py",
        "np.asarray(x), Target(self.sde, self._eps, self.levels, model)",
        "np.asarray(x), Target(self.sde, self._eps, self.levels + 1, model)",
        ("test_density.py::test_bits_per_dim_are_of_the_integers",),
    ),
    Mistake(
        "posterior: error of the prior halved",
        "sbml/density/posterior.py",
        "prior=2 * prior * float(",
        "prior=prior * float(",
        ("test_distribution.py::test_lost_examples_are_named_and_large_differences_are_kept",),
    ),
    Mistake(
        "difference of two means: width over the root of 2",
        "sbml/statistics/intervals.py",
        "math.sqrt(a + b), one.nonfinite",
        "math.sqrt((a + b) / 2), one.nonfinite",
        ("test_intervals.py::test_a_difference_of_two_samples_against_welch",),
    ),
    Mistake(
        "comparison: unpaired",
        "sbml/program/report/comparison.py",
        "mean_interval(of[1][here] - first[1][there])",
        "mean_interval(of[1][here] - np.roll(first[1][there], 1))",
        ("test_compare.py::test_differences_are_computed_from_the_images_that_both_runs_have",),
    ),
    # Data, keys, sharding and checkpoints.
    Mistake(
        "batch does not depend on its step",
        "sbml/program/modes/train.py",
        "batches[start + dispatch * stride + i]",
        "batches[start + i]",
        ("test_train_failures.py::test_the_rows_after_a_kill_are_means_over_all_of_their_steps",),
    ),
    Mistake(
        "padded rows are counted",
        "sbml/core/pytrees.py",
        "np.asarray(a)[: len(batch)]",
        "np.asarray(a)",
        ("test_data_batches.py::test_every_image_counts_exactly_once",),
    ),
    Mistake(
        "noises and dequantization have one key",
        "sbml/program/config/objective.py",
        'split(stream(key, "rows"), n)',
        'split(stream(key, "dequantization"), n)',
        ("test_train_draws.py::test_antithetic_pairs_are_one_image_and_time_with_opposite_noise",),
    ),
    Mistake(
        "mask of the known part ignored",
        "sbml/samplers/known.py",
        "return jnp.where(mask == 1, known, x)",
        "return jnp.where(mask >= 0, known, x)",
        ("test_latents.py::test_the_unknown_part_may_be_nan",),
    ),
    Mistake(
        "average is one step late",
        "sbml/program/runtime/state.py",
        "optax.incremental_update(params,",
        "optax.incremental_update(state.params,",
        ("test_train_step.py::test_average_is_exponential_and_warmup_starts_at_zero",),
    ),
    Mistake(
        "checksum of a checkpoint not compared",
        "sbml/program/runtime/checkpoint.py",
        "if crc32 != saved:",
        "if crc32 != crc32:",
        ("test_checkpoint_damage.py::test_damage_is_reported_and_the_previous_checkpoint_is_used",),
    ),
    Mistake(
        "a resumed run leaves out a step",
        "sbml/program/modes/train.py",
        "return restored.state, restored.step, provenance",
        "return restored.state, restored.step + 1, provenance",
        ("test_train_failures.py::test_the_rows_after_a_kill_are_means_over_all_of_their_steps",),
    ),
    Mistake(
        "a test image is left out",
        "sbml/data/digits.py",
        "slice(-TEST_COUNT, None)",
        "slice(-TEST_COUNT, -1)",
        ("test_data.py::test_digits_are_scikit_learns_file",),
    ),
    Mistake(
        "all processes read the rows of the first",
        "sbml/data/_pipeline.py",
        "slice(process_index * local, (process_index + 1) * local)",
        "slice(0, local)",
        ("test_data_batches.py::test_process_shards_make_up_the_global_batch",),
    ),
    Mistake(
        "test images are shuffled",
        "sbml/program/evaluation/cells.py",
        "np.sort(order[:number])",
        "order[:number]",
        ("test_evaluate.py::test_fewer_images_are_a_random_sample_and_part_of_any_larger_one",),
    ),
    Mistake(
        "other dequantization in training than in evaluation",
        "sbml/program/config/objective.py",
        "return bits.to_model(pixels, u, levels)",
        "return 2.0 * (pixels + u) / (levels - 1) - 1.0",
        ("test_train_draws.py::test_what_the_network_is_trained_on",),
    ),
    Mistake(
        "lock not taken",
        "sbml/program/runtime/lock.py",
        "lock.acquire()",
        "pass",
        ("test_lock.py",),
    ),
    # Modes: what they train on and report.
    Mistake(
        "class labels are zero in training",
        "sbml/program/config/objective.py",
        "conditioned(score, draws.label)",
        "conditioned(score, None if draws.label is None else 0 * draws.label)",
        ("test_classes.py::test_the_loss_is_zero_for_a_score_that_knows_the_image_of_each_class",),
    ),
    Mistake(
        "training of a dequantizer: sign of log q",
        "sbml/program/modes/train_dequantizer.py",
        "(nll + log_q) / dims",
        "(nll - log_q) / dims",
        ("test_train_dequantizer.py::test_the_loss_is_the_bound_plus_log_q",),
    ),
    Mistake(
        "training of a dequantizer: bound and dequantization have one key",
        "sbml/program/modes/train_dequantizer.py",
        'split(stream(key, "bound"), n)',
        'split(stream(key, "dequantization"), n)',
        ("test_streams.py::test_each_purpose_of_a_step_has_a_stream_of_its_own",),
    ),
    Mistake(
        "classifier: prior dropped from the mixture",
        "sbml/program/evaluation/classifier.py",
        "special.logsumexp(log_p + np.log(prior), axis=1)",
        "special.logsumexp(log_p, axis=1)",
        ("test_classes.py::test_the_numbers_of_a_classifier_are_those_of_bayes_rule",),
    ),
    Mistake(
        "latents: data are moved",
        "sbml/program/modes/latents.py",
        "images.levels) / factor",
        "images.levels) / factor + 0.1",
        ("test_latents.py::test_the_operations_with_a_score_in_closed_form",),
    ),
)


def defines(path: pathlib.Path, name: str) -> bool:
    """Whether a file of tests has the test ``name``; without a name, whether it has any."""
    name = name.partition("[")[0]
    return f"def {name}(" in path.read_text() if name else "def test_" in path.read_text()


def check(mistakes: Sequence[Mistake] = MISTAKES) -> None:
    """Check that every text to replace occurs once, and that every named test exists."""
    for each in mistakes:
        count = (ROOT / each.file).read_text().count(each.find)
        if count != 1:
            raise ValueError(
                f"mistake {each.name!r}: {each.find!r} occurs {count} times in {each.file}, not "
                "once; write the line as it is now into benchmarks/mutations.py"
            )
        for test in each.tests:
            file, _, name = test.partition("::")
            path = ROOT / "tests" / file
            if not path.exists() or not defines(path, name):
                raise ValueError(
                    f"mistake {each.name!r}: there is no test {test}; name the one that notices "
                    "the mistake in benchmarks/mutations.py"
                )


def copy_to(folder: pathlib.Path) -> None:
    """Copy the files that git knows, as they are now, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run(command: list[str], folder: pathlib.Path) -> tuple[int, str]:
    """The exit status and the output of a Python command in ``folder``.

    Raises:
      subprocess.TimeoutExpired: it has not ended after ``LIMIT`` seconds.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=environment, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # Tests may have started processes of their own.
        process.communicate()
        raise
    return process.returncode, output


def first_failure(tests: Sequence[str], folder: pathlib.Path) -> str:
    """The first of the quick ones of ``tests`` that fails, or "" if none does."""
    options = ["-n", "0", "-x", "-p", "no:cacheprovider", "-m", QUICK]
    status, output = run(["pytest", *options, *(f"tests/{test}" for test in tests)], folder)
    failed = re.search(r"(?m)^(?:FAILED|ERROR) tests/(\S+)", output)
    if status in (0, 5) or (status == 1 and failed):
        return failed[1] if failed else ""
    raise RuntimeError(f"pytest ended with status {status}:\n{output[-4000:]}")


def failed_rows(folder: pathlib.Path) -> str:
    """The rows of ``--mode=verify`` that fail, or "" if none does."""
    status, output = run(["sbml.main", "--mode=verify"], folder)
    failed = re.search(r"(?m)^failed: (.*)", output)
    if status == 0 or (status == 1 and failed):
        return failed[1] if failed else ""
    raise RuntimeError(f"--mode=verify ended with status {status}:\n{output[-4000:]}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [each.name for each in MISTAKES]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME")
    parser.add_argument("--mode", choices=("tests", "verify"), default="tests")
    args = parser.parse_args()
    chosen = [each for each in MISTAKES if not args.only or each.name in args.only]
    check(chosen)
    noticed = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        folder = pathlib.Path(scratch)
        copy_to(folder)

        def failure(tests: Sequence[str]) -> str:
            if args.mode == "verify":
                return failed_rows(folder)
            return first_failure(tests, folder)

        every = sorted({test for each in chosen for test in each.tests})
        if failed := failure(every):
            raise SystemExit(f"{failed} fails without a mistake; mend it first")
        print("| mistake | file | noticed by | seconds |\n|---|---|---|---|", flush=True)
        for each in chosen:
            path = folder / each.file
            right, start = path.read_text(), time.monotonic()
            write(path, right.replace(each.find, each.wrong))
            try:
                found = failure(each.tests)
            except subprocess.TimeoutExpired:
                found = ""
            write(path, right)
            noticed += bool(found)
            cells = each.name, each.file, found or "**nothing**", f"{time.monotonic() - start:.0f}"
            print("|", " | ".join(cells), "|", flush=True)
    print(f"\n{noticed} of {len(chosen)} mistakes are noticed")
    sys.exit(noticed < len(chosen))


def write(path: pathlib.Path, text: str) -> None:
    """Write a module, and remove its bytecode: Python would use it if time and size are equal."""
    path.write_text(text)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


if __name__ == "__main__":
    main()
