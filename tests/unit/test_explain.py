from __future__ import annotations

import json
import math
from dataclasses import replace

from vllm_adainfer.offline.reports.explain import Explanation
from vllm_adainfer.offline.reports.views import View

EARLY = View(4, "'good'", 0.9, 0.8, 2.0, 1.5, True)
CLOSED = View(2, "'bad'", 0.6, 0.2, 0.1, math.inf, False)  # nothing leaves there at this bound
FULL = View(6, "'good'", 0.99, 0.98)
FOUND = Explanation(12, 6, 0.02, 4, (CLOSED, EARLY, FULL))


def test_it_says_where_the_request_leaves_and_whether_full_depth_answers_alike():
    table = str(FOUND).splitlines()
    assert [line for line in table if line.endswith("exits")] == [table[3]]
    assert table[-1] == (
        "It exits after 4 of 6 layers at epsilon 0.02 and answers 'good', the same as at full "
        "depth."
    )
    changed = replace(FOUND, views=(CLOSED, EARLY, replace(FULL, answer="'bad'")))
    assert str(changed).endswith("and answers 'good', not 'bad' as at full depth.")


def test_it_says_that_a_request_runs_all_layers():
    stays = replace(FOUND, leaves_after=6, views=(CLOSED, FULL))
    assert str(stays).endswith("it runs all 6 layers and answers 'good'.")


def test_it_says_that_the_policy_serves_other_prompts_whatever_it_makes_of_this_one():
    other = replace(FOUND, leaves_after=6, served="that begin with 'Review:'")
    assert str(other).endswith(
        "It runs all 6 layers and answers 'good': the policy serves prompts that begin with "
        "'Review:', and this one does not."
    )


def test_its_json_has_no_number_that_json_lacks():
    views = json.loads(json.dumps(FOUND.as_dict(), allow_nan=False))["views"]
    assert [view["threshold"] for view in views] == [None, 1.5, None]
