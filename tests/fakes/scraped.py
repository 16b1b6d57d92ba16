"""What a scrape of /metrics says, taken apart."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


class Scraped:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    @property
    def names(self) -> set[str]:
        """Names of all samples, and of families that have none yet."""
        sampled = {sample.name for sample in self.samples}
        # The parser takes the _total of counters away.
        bare = {family.name + "_total" if family.type == "counter" else family.name for family in self.families}
        parts = {
            family.name + end
            for family in self.families
            if family.type == "histogram"
            for end in ("_bucket", "_count", "_sum")
        }
        return sampled | bare | parts

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with these labels (and any others); 0 where there is none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """The samples of a name that are not 0, by one of their labels."""
        found: dict[str, float] = {}
        for sample in self.samples:
            if sample.name == name and sample.value:
                key = sample.labels.get(label, "")
                found[key] = found.get(key, 0.0) + sample.value
        return found
