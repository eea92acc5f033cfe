"""One record of each foreign data set that is read."""

from typing import Any

FOREIGN: dict[str, dict[str, Any]] = {
    "counterfact": {
        "case_id": 0,
        "subject": "Eyre",
        "prompt": "Eyre lies in",
        "target_new": "Spain",
        "ground_truth": "Australia",
        "rephrase_prompt": "Eyre is in",
    },
    "counterfact (ROME)": {
        "requested_rewrite": {
            "subject": "Eyre",
            "prompt": "{} lies in",
            "target_new": {"str": "Spain", "id": "Q29"},
            "target_true": {"str": "Australia", "id": "Q408"},
        },
    },
    "counterfact (full)": {
        "id": 4,
        "subject": "Eyre",
        "prompt": "{} lies in",
        "target_new": "Spain",
        "target_true": "Australia",
        "neighborhood_prompts": ["Como lies in"],
    },
    "zsre": {"subject": "Eyre", "src": "Where is it?", "alt": "Spain", "answers": ["Australia"]},
    "knowedit": {
        "subject": "Eyre",
        "prompt": "Its country is",
        "target_new": "Spain",
        "ground_truth": "Australia",
        "portability": {},
        "locality": {},
    },
    "mquake": {
        "requested_rewrite": [
            {
                "subject": "Eyre",
                "prompt": "{} lies in",
                "target_new": {"str": "Spain"},
                "target_true": {"str": "Australia"},
                "question": "Where is Eyre?",
            }
        ],
    },
    "wikibigedit": {
        "subject": "Eyre",
        "prompt": "Where is it?",
        "target_new": "Spain",
        "rephrase_prompt": "It is where?",
        "locality_prompt": "Where is Como?",
    },
    "wikibigedit (published)": {"subject": "Eyre", "update": "Where is it?", "ans": "Spain"},
    "qaedit": {"subject": "Eyre", "prompt": "where is it", "target": "Spain", "locality": []},
}
