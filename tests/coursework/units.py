"""What is graded: five units from easy to hard, and for each function its tests and an example.

An example is an expression. specify.py prints it with the value that the project's own function
gives, with `tensor` for torch.tensor.
"""

from dataclasses import dataclass


@dataclass
class Graded:
    """A function, or a class, that a student writes."""

    name: str
    module: str  # where the project defines it
    minutes: int  # expected effort
    tests: list  # names of the test functions that grade it
    example: str
    methods: tuple = ()  # of a class: those to write; the rest is given


@dataclass
class Unit:
    """Functions that are learnt together."""

    title: str
    hint: str
    functions: list

    @property
    def hours(self):
        return sum(graded.minutes for graded in self.functions) / 60


UNITS = [
    Unit(
        "1 parts of T5",
        "T5 subtracts no mean, scales no attention scores, and its biases depend on "
        "key - query only.",
        [
            Graded(
                "RMSNorm",
                "t5_small",
                20,
                ["test_rms_norm"],
                "RMSNorm(2, 12.5)(tensor([[3.0, 4.0]]))",
                ("forward",),
            ),
            Graded(
                "padding_bias",
                "t5_small",
                10,
                ["test_padding_bias"],
                "padding_bias(tensor([[5, 1, 0]]))",
            ),
            Graded(
                "Attention",
                "t5_small",
                50,
                ["test_attention_one_head", "test_attention_many_heads"],
                "Attention(T5Config(d_model=2, d_kv=2, num_heads=1)).eval().weights("
                "tensor([[[0.0, 0.0]]]), tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), "
                "tensor([0.0, -1e9]))",
                ("weights", "forward"),
            ),
            Graded(
                "relative_position_bucket",
                "t5_small",
                40,
                ["test_relative_position_bucket"],
                "relative_position_bucket(tensor([-200, -20, -2, 0, 2, 20]), True), "
                "relative_position_bucket(tensor([-20, -2, 2]), False)",
            ),
        ],
    ),
    Unit(
        "2 tokens in and out",
        "Count positions on paper first: where does a span, a response, a set of tokens begin "
        "and end?",
        [
            Graded(
                "response_mask",
                "ppo",
                20,
                ["test_response_mask"],
                "response_mask(tensor([[5, 6, 1, 0], [5, 6, 7, 8]]))",
            ),
            Graded(
                "span_corrupt",
                "data",
                40,
                ["test_span_corruption"],
                "span_corrupt([11, 12, 13, 14, 15], [(1, 2)], [99, 98])",
            ),
            Graded(
                "filter_logits",
                "t5_small",
                60,
                ["test_filter_logits", "test_filter_logits_ties"],
                "filter_logits(tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6), "
                "filter_logits(tensor([[0.5, 0.3, 0.2]]).log(), top_k=1)",
            ),
        ],
    ),
    Unit(
        "3 identifiers, reward, metrics",
        "Padding must not count. A corpus's F1 is made of counts, not of averaged batches.",
        [
            Graded(
                "mean_pool",
                "identifiers",
                15,
                ["test_mean_pool"],
                "mean_pool(tensor([[[1.0], [3.0], [9.0]]]), tensor([[True, True, False]]))",
            ),
            Graded(
                "class_weights",
                "identifiers",
                25,
                ["test_class_weights", "test_class_weights_of_absent_levels"],
                "class_weights(tensor([[0], [0], [1], [2]]), 1.0)",
            ),
            Graded(
                "empathy_reward",
                "identifiers",
                30,
                [
                    "test_empathy_reward_is_the_product",
                    "test_empathy_reward_ordinal",
                    "test_empathy_reward_is_expected_over_uncertain_targets",
                    "test_empathy_reward_unknown_difference",
                ],
                "[empathy_reward(tensor([[[0.7, 0.2, 0.1]] * 3]).log(), tensor([[0, 1, 0]]), d) "
                "for d in ('cross_entropy', 'ordinal')]",
            ),
            Graded(
                "f1_scores",
                "identifiers",
                40,
                ["test_f1_scores"],
                "f1_scores(tensor([[3, 1, 0], [0, 2, 0], [0, 0, 4]]))",
            ),
            Graded(
                "emp_f1",
                "identifiers",
                20,
                ["test_emp_f1"],
                "emp_f1(tensor([[0, 1, 2], [0, 1, 2]]), tensor([[0, 1, 2], [0, 1, 1]]))",
            ),
            Graded(
                "paired_bootstrap",
                "identifiers",
                50,
                ["test_paired_bootstrap", "test_paired_bootstrap_is_the_plain_loop"],
                "paired_bootstrap(tensor([[0], [0], [1], [2]]), tensor([[0], [1], [1], [2]]), "
                "*[tensor([[0], [1], [1], [2]])] * 2)",
            ),
        ],
    ),
    Unit(
        "4 from a reward to advantages",
        "Take the log-probs under the distribution that was sampled from. The reward belongs "
        "to the last token, not to the last column.",
        [
            Graded(
                "token_log_probs",
                "ppo",
                45,
                ["test_token_log_probs"],
                "token_log_probs(tensor([[1.0, 1.0, 2.0]]).log(), tensor([2]), "
                "tensor([[True, False, True]]), 0.5)",
            ),
            Graded(
                "kl_estimate",
                "ppo",
                15,
                ["test_kl_estimate"],
                "kl_estimate(tensor([-1.0]), tensor([-2.0]), 'k3')",
            ),
            Graded(
                "token_rewards",
                "ppo",
                30,
                ["test_token_rewards"],
                "token_rewards(tensor([1.0]), tensor([[2.0, -1.0, 0.0]]), "
                "tensor([[True, True, False]]), 0.1)",
            ),
            Graded(
                "gae",
                "ppo",
                50,
                ["test_gae", "test_gae_ignores_padding"],
                "gae(tensor([[0.0, 1.0, 0.0]]), tensor([[0.5, 0.5, 9.0]]), "
                "tensor([[True, True, False]]), 1.0, 0.5)",
            ),
            Graded(
                "whiten",
                "ppo",
                40,
                ["test_whiten"],
                "whiten(tensor([[1.0, 3.0, 9.0]]), tensor([[True, True, False]])), "
                "whiten(tensor([[1.0, 3.0, 9.0]]), tensor([[True, True, False]]), False)",
            ),
        ],
    ),
    Unit(
        "5 PPO",
        "The larger of two losses is the pessimistic one. Every mean is over the mask.",
        [
            Graded(
                "policy_loss",
                "ppo",
                45,
                ["test_policy_loss"],
                "policy_loss(tensor([[0.0]]), tensor([[-1.0]]), tensor([[1.0]]), "
                "tensor([[True]]))",
            ),
            Graded(
                "value_loss",
                "ppo",
                45,
                ["test_value_loss"],
                "value_loss(tensor([[1.0]]), tensor([[0.0]]), tensor([[2.0]]), "
                "tensor([[True]]))",
            ),
            Graded(
                "adapt_kl_coef",
                "ppo",
                30,
                ["test_adapt_kl_coef"],
                "adapt_kl_coef(0.2, 12.0, 6.0, 32, 1000)",
            ),
        ],
    ),
]
TEST_FILES = {
    "data": "test_data.py",
    "t5_small": "test_t5.py",
    "ppo": "test_ppo.py",
    "identifiers": "test_identifiers.py",
}


def all_graded():
    """name -> Graded, of all units."""
    found = {}
    for unit in UNITS:
        for graded in unit.functions:
            found[graded.name] = graded
    return found


def graders():
    """(test file, test function) -> (unit, the name of the function that it grades)."""
    found = {}
    for unit in UNITS:
        for graded in unit.functions:
            for test in graded.tests:
                found[TEST_FILES[graded.module], test] = unit, graded.name
    return found
