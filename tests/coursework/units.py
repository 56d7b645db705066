"""What is graded: units from easy to hard, their functions with the tests and a worked example of each.

A function's example is an expression; specify.py prints it with the value that the project's own function gives.
"""

from dataclasses import dataclass


@dataclass
class Graded:
    minutes: int  # expected effort
    module: str  # where the project defines it
    tests: list  # names of the test functions that grade it
    example: str
    methods: tuple = ()  # of a class: those to write; the rest is given


UNITS = {
    "1 parts of T5": (
        "2 hours",
        "T5 subtracts no mean, scales no attention scores, and its biases depend on key - query only.",
        {
            "RMSNorm": Graded(
                20,
                "t5_small",
                ["test_rms_norm"],
                "RMSNorm(2, 12.5)(tensor([[3.0, 4.0]]))",
                ("forward",),
            ),
            "padding_bias": Graded(
                10, "t5_small", ["test_padding_bias"], "padding_bias(tensor([[5, 1, 0]]))"
            ),
            "Attention": Graded(
                50,
                "t5_small",
                ["test_attention_one_head", "test_attention_many_heads"],
                "Attention(T5Config(d_model=2, d_kv=2, num_heads=1)).eval().weights(tensor([[[0.0, 0.0]]]), "
                "tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), tensor([0.0, -1e9]))",
                ("weights", "forward"),
            ),
            "relative_position_bucket": Graded(
                40,
                "t5_small",
                ["test_relative_position_bucket"],
                "relative_position_bucket(tensor([-200, -20, -2, 0, 2, 20]), True), relative_position_bucket(tensor([-20, -2, 2]), False)",
            ),
        },
    ),
    "2 tokens in and out": (
        "2 hours",
        "Count positions on paper first: where does a span, a response, a set of tokens begin and end?",
        {
            "response_mask": Graded(
                20,
                "ppo",
                ["test_response_mask"],
                "response_mask(tensor([[5, 6, 1, 0], [5, 6, 7, 8]]))",
            ),
            "span_corrupt": Graded(
                40,
                "data",
                ["test_span_corruption"],
                "span_corrupt([11, 12, 13, 14, 15], [(1, 2)], [99, 98])",
            ),
            "filter_logits": Graded(
                60,
                "t5_small",
                ["test_filter_logits", "test_filter_logits_ties"],
                "filter_logits(tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6), filter_logits(tensor([[0.5, 0.3, 0.2]]).log(), top_k=1)",
            ),
        },
    ),
    "3 identifiers, reward, metrics": (
        "3 hours",
        "Padding must not count; a score of a corpus is made of counts, not of averaged batches.",
        {
            "masked_mean": Graded(
                15,
                "identifiers",
                ["test_masked_mean"],
                "masked_mean(tensor([[[1.0], [3.0], [9.0]]]), tensor([[True, True, False]]))",
            ),
            "class_weights": Graded(
                25,
                "identifiers",
                ["test_class_weights", "test_class_weights_of_absent_levels"],
                "class_weights(tensor([[0], [0], [1], [2]]), 1.0)",
            ),
            "empathy_reward": Graded(
                30,
                "identifiers",
                [
                    "test_empathy_reward_is_the_product",
                    "test_empathy_reward_ordinal",
                    "test_empathy_reward_is_expected_over_uncertain_targets",
                    "test_empathy_reward_unknown_difference",
                ],
                "[empathy_reward(tensor([[[0.7, 0.2, 0.1]] * 3]).log(), tensor([[0, 1, 0]]), d) for d in ('cross_entropy', 'ordinal')]",
            ),
            "f1_scores": Graded(
                40,
                "identifiers",
                ["test_f1_scores"],
                "f1_scores(tensor([[3, 1, 0], [0, 2, 0], [0, 0, 4]]))",
            ),
            "emp_f1": Graded(
                20,
                "identifiers",
                ["test_emp_f1"],
                "emp_f1(tensor([[0, 1, 2], [0, 1, 2]]), tensor([[0, 1, 2], [0, 1, 1]]))",
            ),
            "paired_bootstrap": Graded(
                50,
                "identifiers",
                ["test_paired_bootstrap", "test_paired_bootstrap_is_the_plain_loop"],
                "paired_bootstrap(tensor([[0], [0], [1], [2]]), tensor([[0], [1], [1], [2]]), *[tensor([[0], [1], [1], [2]])] * 2)",
            ),
        },
    ),
    "4 from a score to advantages": (
        "3 hours",
        "Score the distribution that was sampled from; the score belongs to the last token, not to the last column.",
        {
            "token_log_probs": Graded(
                45,
                "ppo",
                ["test_token_log_probs"],
                "token_log_probs(tensor([[1.0, 1.0, 2.0]]).log(), tensor([2]), tensor([[True, False, True]]), 0.5)",
            ),
            "kl_estimate": Graded(
                15,
                "ppo",
                ["test_kl_estimate"],
                "kl_estimate(tensor([-1.0]), tensor([-2.0]), 'k3')",
            ),
            "token_rewards": Graded(
                30,
                "ppo",
                ["test_token_rewards"],
                "token_rewards(tensor([1.0]), tensor([[-1.0, -1.0, 0.0]]), tensor([[-2.0, -1.0, 0.0]]), tensor([[True, True, False]]), 0.1)",
            ),
            "gae": Graded(
                50,
                "ppo",
                ["test_gae", "test_gae_ignores_padding"],
                "gae(tensor([[0.0, 1.0, 0.0]]), tensor([[0.5, 0.5, 9.0]]), tensor([[True, True, False]]), 1.0, 0.5)",
            ),
            "whiten": Graded(
                40,
                "ppo",
                ["test_whiten"],
                "whiten(tensor([[1.0, 3.0, 9.0]]), tensor([[True, True, False]])), whiten(tensor([[1.0, 3.0, 9.0]]), tensor([[True, True, False]]), False)",
            ),
        },
    ),
    "5 PPO": (
        "2 hours",
        "The larger of two losses is the pessimistic one; every mean is over the mask.",
        {
            "policy_loss": Graded(
                45,
                "ppo",
                ["test_policy_loss"],
                "policy_loss(tensor([[0.0]]), tensor([[-1.0]]), tensor([[1.0]]), tensor([[True]]))",
            ),
            "value_loss": Graded(
                45,
                "ppo",
                ["test_value_loss"],
                "value_loss(tensor([[1.0]]), tensor([[0.0]]), tensor([[2.0]]), tensor([[True]]))",
            ),
            "adapt_kl_coef": Graded(
                30, "ppo", ["test_adapt_kl_coef"], "adapt_kl_coef(0.2, 12.0, 6.0, 32, 1000)"
            ),
        },
    ),
}
FILES = {
    "data": "test_data.py",
    "t5_small": "test_t5.py",
    "ppo": "test_ppo.py",
    "identifiers": "test_identifiers.py",
}


def graders():
    """{(test file, test function): (unit, name of the graded function)}"""
    return {
        (FILES[graded.module], test): (unit, name)
        for unit, (_, _, functions) in UNITS.items()
        for name, graded in functions.items()
        for test in graded.tests
    }
