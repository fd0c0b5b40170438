"""The backbone: transformers' own states and scores, frozen, with adapters and new rows that train."""

import pytest
import tiny
import torch

from mmbridge.backbones import CausalLM, Lora, NewRows
from mmbridge.errors import CheckpointError, ConfigError, ContextError

IDS = torch.tensor([[1, 9, 40, 41, 7], [1, 12, 3, 5, 60]])


@pytest.fixture(scope="module")
def source(parts):
    return parts["llama"]


@pytest.fixture(scope="module")
def backbone(source):
    return CausalLM(source, template="plain")


def test_states_and_scores_are_those_of_transformers(backbone):
    with torch.no_grad():
        theirs = backbone.model(input_ids=IDS, output_hidden_states=True)
        hidden = backbone(backbone.embed(IDS))
    torch.testing.assert_close(hidden, theirs.hidden_states[-1])
    torch.testing.assert_close(backbone.logits(hidden), theirs.logits)


def test_the_cache_continues_where_it_stopped(backbone):
    embeddings = backbone.embed(IDS)
    cache = backbone.new_cache()
    with torch.no_grad():
        parts = [backbone(embeddings[:, place], cache=cache) for place in (slice(0, 2), slice(2, 3), slice(3, 5))]
        torch.testing.assert_close(torch.cat(parts, dim=1), backbone(embeddings), atol=1e-5, rtol=1e-5)


def test_a_mask_of_two_or_four_dimensions_hides_the_same(backbone):
    embeddings = backbone.embed(IDS)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    allowed = (torch.ones(5, 5).tril().bool() & mask[:, None].bool())[:, None]
    with torch.no_grad():
        flat, square = backbone(embeddings, mask), backbone(embeddings, allowed)
    torch.testing.assert_close(flat[mask.bool()], square[mask.bool()], atol=1e-5, rtol=1e-5)


def test_everything_is_frozen_and_stays_in_evaluation_mode(backbone):
    backbone.train()
    assert not any(value.requires_grad for value in backbone.parameters())
    assert not any(module.training for name, module in backbone.named_modules() if name)


def test_adapters_train_and_start_without_effect(source, backbone):
    adapted = CausalLM(source, lora=Lora(rank=2, alpha=4, dropout=0.5), template="plain")
    assert len(adapted.adapters) == 2 * 4 * 2
    assert all(value.requires_grad == (name in adapted.adapters) for name, value in adapted.model.named_parameters())
    torch.testing.assert_close(adapted(adapted.embed(IDS)), backbone(backbone.embed(IDS)))
    adapted.train()
    dropouts = [module for name, module in adapted.model.named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts
    assert all(module.training for module in dropouts)
    adapted(adapted.embed(IDS)).sum().backward()
    assert all(value.grad is not None for value in adapted.adapters.values())


def test_a_trainable_model_trains_as_a_whole(source, backbone):
    whole = CausalLM(source, trainable=True, template="plain")
    assert list(whole.parts()) == ["weights"]
    assert whole.parts()["weights"].keys() == dict(whole.model.named_parameters()).keys()
    torch.testing.assert_close(whole(whole.embed(IDS)), backbone(backbone.embed(IDS)))
    assert all(module.training for module in whole.train().modules())
    assert not any(module.training for module in whole.eval().modules())
    whole.logits(whole(whole.embed(IDS))).square().sum().backward()
    assert all(value.grad is not None for value in whole.parts()["weights"].values())
    whole.requires_grad_(False)
    assert not any(module.training for name, module in whole.train().named_modules() if name)
    assert backbone.parts() == {}


def test_a_model_trains_as_a_whole_or_by_adapters(source):
    with pytest.raises(
        ConfigError, match="got both lora and trainable: true; give lora to train adapters, or trainable"
    ):
        CausalLM(source, lora=Lora(), trainable=True)


def test_adapters_of_a_model_in_half_precision_train_in_full(source):
    adapted = CausalLM(source, lora=Lora(rank=2, alpha=4), template="plain", dtype="bfloat16")
    assert adapted.dtype == torch.bfloat16
    assert {value.dtype for value in adapted.adapters.values()} == {torch.float32}
    hidden = adapted(adapted.embed(IDS))
    assert hidden.dtype == torch.bfloat16
    hidden.sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in adapted.adapters.values())


def test_adapters_are_set_by_plain_data_as_in_a_recipe(source):
    adapted = CausalLM(source, lora={"rank": 3, "alpha": 6, "targets": ["q_proj"]}, template="plain")
    assert {tuple(value.shape) for value in adapted.adapters.values()} == {(3, 32), (32, 3)}
    with pytest.raises(ConfigError, match=r"LoRA target 'query' is no linear layer .* q_proj"):
        CausalLM(source, lora={"targets": ["query"]})


def test_recomputed_activations_give_the_same_gradient(source):
    """Also where only what stands before the backbone trains."""
    gradients, passes = [], []
    for recompute in (False, True):
        backbone = CausalLM(source, template="plain")
        if recompute:
            backbone.checkpoint_activations()
        backbone.train()
        count = []
        backbone.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        embeddings = backbone.embed(IDS).detach().requires_grad_()
        backbone(embeddings, torch.ones_like(IDS)).square().sum().backward()
        gradients.append(embeddings.grad)
        passes.append(len(count))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert passes == [1, 2]
    assert not backbone.embed(IDS).requires_grad  # a stage that trains only what comes after must not pass back


def test_checkpointing_does_not_disturb_generation(source):
    backbone = CausalLM(source, template="plain")
    backbone.checkpoint_activations()
    backbone.train().eval()
    cache = backbone.new_cache()
    with torch.no_grad():
        backbone(backbone.embed(IDS), cache=cache)
    assert cache.get_seq_length() == 5


def test_tokens_come_with_their_place_in_the_text(backbone):
    text = "It is red."
    ids, places = backbone.tokenize(text)
    assert "".join(text[start:end] for start, end in places) == text
    assert backbone.tokenizer.decode(ids) == text


def test_sequences_beyond_the_context_are_refused(backbone):
    with pytest.raises(ContextError, match="513 positions .* context of 512; shorten the dialogue"):
        backbone(torch.zeros(1, 513, 32))


def test_sources_that_hold_no_model_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"backbone .*empty.* can't be loaded"):
        CausalLM(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="no file or folder"):
        CausalLM("./nowhere")


def test_a_template_must_exist(source):
    with pytest.raises(ConfigError, match=r"has no chat template; give template='vicuna' or 'plain'"):
        _ = CausalLM(source).template


def test_models_that_change_their_logits_are_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="changes its logits after the head"):
        CausalLM(str(tmp_path))


def test_the_manifest_entry_changes_with_the_weights(source, tmp_path):
    other = tiny.llama(tmp_path / "other", intermediate_size=48)
    first, second = (CausalLM(path, template="plain").describe() for path in (source, other))
    assert len(first["sha256"]) == 64
    assert first["sha256"] != second["sha256"]


def test_new_rows_start_like_words_and_all_differ():
    base = torch.randn(500, 16) * 3 + 1
    rows = NewRows(base, 5, emitted=1)
    assert rows.embedding.shape == (5, 16)
    assert rows.head.shape == (1, 16)
    assert len({tuple(row.tolist()) for row in rows.embedding}) == 5
    assert float(rows.embedding.detach().norm(dim=1).mean()) == pytest.approx(float(base.norm(dim=1).mean()), rel=0.3)
    assert torch.equal(rows.embedding, NewRows(base, 5).embedding)
