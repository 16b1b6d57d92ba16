"""Which model answers items that name none."""

from __future__ import annotations

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.integration.service import chats, house
from unisono.bootstrap import usable_model
from unisono.config import Settings

MODELS = [
    FakeModel(name="large", size=9_000),
    FakeModel(name="small", size=1_000),
    FakeModel(name="tiny-embed", size=10, capabilities=("embedding",)),
]


async def test_the_configured_model_answers_items_that_name_none() -> None:
    """With UNISONO_DEFAULT_MODEL, a backend may have several models, and batches need not name one."""
    async with house(models=MODELS, settings={"default_model": "large"}) as h:
        seen = await h.run(chats(2, num_predict=1), model="")
        assert {result.completion.model for result in seen.results.values()} == {"large:latest"}


async def test_a_command_takes_what_is_loaded_or_the_smallest() -> None:
    """A service for one command picks a model that can complete: one in memory, or the smallest."""
    async with FakeOllama(MODELS) as fake:
        settings = Settings(ollama_url=fake.url)
        assert await usable_model(settings) == "small:latest"
        assert await usable_model(settings.model_copy(update={"default_model": "other"})) == "other"
        async with house(models=MODELS) as h:
            _ = await h.run(chats(1, num_predict=1), model="large")
            assert await usable_model(Settings(ollama_url=h.fake.url)) == "large:latest"
        await fake.go_away()
        assert await usable_model(settings) is None


async def test_an_ollama_without_models_is_none_to_use() -> None:
    """Where nothing can complete a prompt, the embedded engine is the better offer."""
    async with FakeOllama(MODELS[2:]) as fake:
        assert await usable_model(Settings(ollama_url=fake.url)) is None
