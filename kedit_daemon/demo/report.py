"""The demo's report: titles, answers before and after, and checks that hold or do not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Echo = Callable[[str], None]


@dataclass
class DemoReport:
    """Prints the steps and their checks, and keeps whether all of them have passed."""

    echo: Echo
    has_passed: bool = True

    def print_title(self, text: str) -> None:
        """Print the title of a step."""
        self.echo(f"\n== {text}")

    def record_check(self, text: str, holds: bool) -> None:
        """Print a check; one that does not hold fails the demo."""
        self.echo(f"   {'ok  ' if holds else 'MISS'} {text}")
        self.has_passed = self.has_passed and holds

    def record_share(self, text: str, right: Sequence[bool], minimum: float | None) -> None:
        """Print how many of the cases are right, as a check of the least share of them; None: as
        a figure alone."""
        line = f"{sum(right)} of {len(right)} {text}"
        if minimum is None:
            self.echo(f"     -  {line} (shown, not judged)")
        else:
            self.record_check(line, sum(right) >= minimum * len(right))

    def print_changes(self, prompts: Sequence[str], old: Sequence[str], new: Sequence[str]) -> None:
        """Print each prompt with its answer before and after."""
        for prompt, before, after in zip(prompts, old, new, strict=True):
            self.echo(f"   {prompt} …  {before}  ->  {after}")

    def print_misses(
        self,
        right: Sequence[bool],
        prompts: Sequence[str],
        old: Sequence[str],
        new: Sequence[str],
    ) -> None:
        """Print the cases that are not right, with the answers before and after."""
        for is_right, *case in zip(right, prompts, old, new, strict=True):
            if not is_right:
                prompt, before, after = case
                self.echo(f"        not: {prompt} …  {before}  ->  {after}")
