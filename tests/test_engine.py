import itertools
import json

import pytest
import torch
from torch import nn

from nanochat.checkpoint_manager import build_model, save_checkpoint
from nanochat.common import UserError
from nanochat.dataset import prepare_tokens
from nanochat.engine import Engine, KVCache, sample_next_token
from nanochat.recipe.shape import GPTConfig
from nanochat.tokenizer import Tokenizer
from processes import python_m

TEXT = "def add(a, b):\n    return a + b  # the sum of a and b, größer und länger – 数\n\n" * 20
# 300 tokens are more than the short window (128) and than the long one (256), so that both bite.
LENGTH, CONTEXT = 300, 256


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator([TEXT], 320)


def make_model(vocab_size=320, n_kv_head=2, pattern="SSSL", dtype=torch.float32, context=CONTEXT):
    """A small model in which everything matters: what is initialized to zero is drawn at random too."""
    torch.manual_seed(1)
    config = GPTConfig(sequence_len=context, vocab_size=vocab_size, n_layer=4, n_head=4, n_kv_head=n_kv_head, n_embd=64,
                       window_pattern=pattern, short_conv=3, exclusive_attention=n_kv_head == 2)
    model = build_model(config, torch.float64, "cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "wte" not in name and "value_embeds" not in name:
                p.normal_(std=2 * p.size(1) ** -0.5)
        model.smear_lambda.fill_(0.7)
    other = build_model(config, dtype, "cpu")
    other.load_state_dict({name: t.to(other.state_dict()[name].dtype) for name, t in model.state_dict().items()})
    return other.eval()


def random_ids(batch_size, length=LENGTH, vocab_size=320, seed=0):
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_in_chunks(model, ids, sizes, capacity=LENGTH):
    """Logits of all positions, through a cache that is fed chunks of these sizes."""
    cache, parts = KVCache.for_model(model, ids.size(0), capacity), []
    for chunk in ids.split(sizes, dim=1):
        cache.reserve(chunk.size(1))
        parts.append(model(chunk, kv_cache=cache))
    assert cache.get_pos() == ids.size(1) and cache.cache_seqlens.tolist() == [ids.size(1)] * ids.size(0)
    assert cache.cache_seqlens.dtype == torch.int32
    return torch.cat(parts, dim=1)


SPLITS = {
    "prefill at once": [LENGTH],
    "prefill, then decode": [150] + [1] * (LENGTH - 150),
    "decode from the first token": [1] * LENGTH,
    "chunks of all sizes": [5, 1, 60, 1, 1, 130, 2, 100],
}


@torch.no_grad()
def full_logits(dtype, n_kv_head):
    ids = random_ids(2)
    return make_model(n_kv_head=n_kv_head, dtype=dtype)(ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_cached_logits_are_those_of_the_full_forward(dtype, n_kv_head):
    model, ids = make_model(n_kv_head=n_kv_head, dtype=dtype), random_ids(2)
    full = full_logits(dtype, n_kv_head)
    # Cached and full logits are two roundings of one function, each about as far from its exact value (float64) as the
    # other. What is off by more than four times that distance is no rounding. The first bound keeps this meaningful.
    rounding = (full - full_logits(torch.float64, n_kv_head)).abs().max().item()
    assert rounding < (2e-4 if dtype == torch.float32 else 3.0) and full.std() > 1
    for name, sizes in SPLITS.items():
        cached = logits_in_chunks(model, ids, sizes)
        assert (cached - full).abs().max().item() <= 4 * rounding, name


@torch.no_grad()
def test_cached_logits_in_float64_are_exact():
    model, ids = make_model(dtype=torch.float64), random_ids(2)
    for name, sizes in SPLITS.items():
        # the logits leave the model in float32 (24 bits) and are below 16 in size
        torch.testing.assert_close(logits_in_chunks(model, ids, sizes), model(ids), rtol=0, atol=16 * 2**-23, msg=name)


@torch.no_grad()
def test_the_comparison_would_notice_windows_smear_and_attention():
    model, ids = make_model(), random_ids(1)
    last = model(ids)[0, -1]
    long_windows = make_model(pattern="L")(ids)[0, -1]
    assert (long_windows - last).abs().max() > 0.01                                                    # the short bite
    assert (make_model(pattern="L", context=2 * CONTEXT)(ids)[0, -1] - long_windows).abs().max() > 1e-3  # the long too
    model.smear_lambda.zero_()
    assert (model(ids)[0, -1] - last).abs().max() > 0.01
    early = ids.clone()
    early[0, 200] = (early[0, 200] + 1) % 320
    assert (make_model()(early)[0, -1] - last).abs().max() > 0.01


def test_a_cache_grows_by_doubling_and_keeps_what_it_holds():
    model, ids = make_model(), random_ids(2)
    small = logits_in_chunks(model, ids, [3, 90, 1, 206], capacity=2)
    torch.testing.assert_close(small, logits_in_chunks(model, ids, [3, 90, 1, 206]), rtol=0, atol=0)
    cache = KVCache(1, 2, 4, 16, 3, "cpu", torch.float32, max_seq_len=10)
    sizes = []
    for _ in range(10):
        cache.reserve(1)
        cache.advance(1)
        sizes.append(cache.seq_len)
    assert sizes == [4, 4, 4, 4, 8, 8, 8, 8, 10, 10]
    with pytest.raises(UserError, match="11 tokens long.*end at 10"):
        cache.reserve(1)


@torch.no_grad()
def test_reset_forgets_the_text():
    model, ids = make_model(), random_ids(1)
    cache = KVCache.for_model(model, 1, LENGTH)
    fresh = model(ids[:, :50], kv_cache=cache)
    model(ids[:, 50:], kv_cache=cache)
    cache.reset()
    assert cache.get_pos() == 0 and cache.prev_embedding is None
    torch.testing.assert_close(model(ids[:, :50], kv_cache=cache), fresh, rtol=0, atol=0)


@torch.no_grad()
def test_one_prefill_serves_many_rows():
    model, prompt, tails = make_model(), random_ids(1, 140), random_ids(3, 5, seed=2)
    one, many = KVCache.for_model(model, 1, 140), KVCache.for_model(model, 3, 1)
    model(prompt, kv_cache=one)
    many.prefill(one)
    many.reserve(5)
    cached = model(tails, kv_cache=many)
    full = model(torch.cat([prompt.expand(3, -1), tails], dim=1))[:, 140:]
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):
        many.prefill(one)  # not empty any more
    with pytest.raises(AssertionError):
        KVCache.for_model(model, 2, 1).prefill(many)


# ---- sampling

def test_sampling_draws_from_the_softmax_of_the_k_likeliest():
    n, logits = 20_000, torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0])
    for top_k, temperature in [(None, 1.0), (0, 1.0), (3, 1.0), (2, 0.5), (99, 2.0)]:
        rng = torch.Generator().manual_seed(0)
        drawn = sample_next_token(logits.expand(n, -1), rng, temperature, top_k)
        assert drawn.shape == (n, 1) and drawn.dtype == torch.int64
        kept = logits.clone()
        if top_k:
            kept[logits.argsort(descending=True)[top_k:]] = -torch.inf
        p = torch.softmax(kept / temperature, dim=-1)
        share = torch.bincount(drawn[:, 0], minlength=5) / n
        assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all(), (top_k, temperature, share, p)


def test_temperature_zero_and_top_1_take_the_likeliest():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    likeliest = logits.argmax(-1, keepdim=True)
    for temperature in (0, 1e-300, 1e-9):
        assert torch.equal(sample_next_token(logits, None, temperature=temperature), likeliest)
    assert torch.equal(sample_next_token(logits, torch.Generator().manual_seed(1), top_k=1), likeliest)


# ---- the engine

class Chain(nn.Module):
    """A Markov chain in the shape of the model: the logits of the next token are a row of a (V, V) table."""

    def __init__(self, table, max_seq_len=1000):
        super().__init__()
        self.table, self.max_seq_len, self.compute_dtype = table, max_seq_len, torch.float32
        self.config = GPTConfig(vocab_size=len(table), n_layer=1, n_head=1, n_kv_head=1, n_embd=2)

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids, kv_cache):
        kv_cache.advance(ids.size(1))
        return self.table[ids]


def chain_of(tokenizer, transitions, **kwargs):
    """A Chain from {token: {next token: probability}}; any other token leads to <|bos|>."""
    vocab_size = tokenizer.get_vocab_size()
    table = torch.full((vocab_size, vocab_size), -torch.inf)
    table[:, tokenizer.get_bos_token_id()] = 0.0
    for token, nexts in transitions.items():
        table[token] = -torch.inf
        for following, p in nexts.items():
            table[token, following] = torch.tensor(p).log()
    return Chain(table, **kwargs)


def test_greedy_generation_is_the_naive_loop(tokenizer):
    model = make_model(tokenizer.get_vocab_size())
    engine = Engine(model, tokenizer)
    for prompt in (TEXT[:40], "x", TEXT[:400]):
        tokens = tokenizer(prompt, prepend="<|bos|>")
        naive = list(tokens)
        with torch.no_grad():
            for _ in range(30):
                following = model(torch.tensor([naive]))[0, -1].argmax().item()
                if following in engine.end_tokens:
                    break
                naive.append(following)
        sequences, masks = engine.generate_batch(tokens, num_samples=2, max_tokens=30, temperature=0)
        assert sequences == [naive, naive] and len(naive) > len(tokens)
        assert masks == [[0] * len(tokens) + [1] * (len(naive) - len(tokens))] * 2


def test_samples_are_reproducible_and_differ_by_row_and_seed(tokenizer):
    engine = Engine(make_model(tokenizer.get_vocab_size()), tokenizer)
    tokens = tokenizer("def add", prepend="<|bos|>")
    first, _ = engine.generate_batch(tokens, 4, max_tokens=20, seed=7)
    assert engine.generate_batch(tokens, 4, max_tokens=20, seed=7)[0] == first
    assert engine.generate_batch(tokens, 4, max_tokens=20, seed=8)[0] != first
    assert len(set(map(tuple, first))) == 4


def test_rows_are_drawn_independently(tokenizer):
    a, b, bos, n = 10, 11, tokenizer.get_bos_token_id(), 4000
    engine = Engine(chain_of(tokenizer, {bos: {a: 0.5, b: 0.5}}), tokenizer)
    column, _ = next(engine.generate([bos], num_samples=n))
    heads = torch.tensor(column) == a
    spread = 5 * 0.5 / n**0.5
    assert abs(heads.float().mean() - 0.5) < spread
    assert abs((heads[1:] == heads[:-1]).float().mean() - 0.5) < spread


def test_rows_end_one_by_one_and_generation_with_the_last(tokenizer):
    go, bos, end = 10, tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    model = chain_of(tokenizer, {go: {go: 0.7, bos: 0.15, end: 0.15}})
    engine = Engine(model, tokenizer)
    steps = list(engine.generate([go], num_samples=20, seed=3))
    columns, masks = zip(*steps, strict=True)
    lengths = []
    for tokens, mask in zip(zip(*columns, strict=True), zip(*masks, strict=True), strict=True):
        n = next(i for i, token in enumerate(tokens) if token in (bos, end))
        lengths.append(n)
        assert set(tokens[:n]) <= {go} and len(set(tokens[n:])) == 1
        assert mask == (1,) * (n + 1) + (0,) * (len(mask) - n - 1)
    assert len(steps) == max(lengths) + 1 and len(set(lengths)) > 3
    sequences, masks = engine.generate_batch([go], num_samples=20, seed=3)
    assert [len(s) - 1 for s in sequences] == lengths and set(itertools.chain(*sequences)) == {go}
    assert [sum(m) for m in masks] == lengths


def test_generation_ends_at_max_tokens_and_where_positions_end(tokenizer):
    go = 10
    engine = Engine(chain_of(tokenizer, {go: {go: 1.0}}, max_seq_len=25), tokenizer)
    assert len(list(engine.generate([go] * 5, max_tokens=7))) == 7
    assert len(list(engine.generate([go] * 5))) == 20
    assert len(list(engine.generate([go] * 5, max_tokens=100, num_samples=3))) == 20
    assert list(engine.generate([go] * 25)) == []
    with pytest.raises(UserError, match="26 tokens long"):
        list(engine.generate([go] * 26))


def test_a_diverged_model_is_refused(tokenizer):
    model = make_model(tokenizer.get_vocab_size())
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not a number"):
        next(Engine(model, tokenizer).generate([1, 2]))


def test_streamed_text_holds_back_unfinished_characters(tokenizer):
    bos = tokenizer.get_bos_token_id()
    ids = [*"é€a".encode(), 0xF0, tokenizer.encode_special("<|assistant_end|>")]  # the first 256 ids are the bytes
    path = [bos, *ids]
    engine = Engine(chain_of(tokenizer, {a: {b: 1.0} for a, b in itertools.pairwise(path)}), tokenizer)
    assert list(engine.stream_text([bos])) == ["é", "€", "a", "\ufffd"]


# ---- the scripts, on a checkpoint of random weights

@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tokenizer):
    """A base directory with one run of two steps, and its tokens."""
    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        text = base / "text"
        text.mkdir()
        for i in range(40):
            (text / f"{i}.txt").write_text(f"# file {i}\n{TEXT[i * 7:i * 7 + 700]}", encoding="utf-8")
        tokens = prepare_tokens(str(text), tokenizer)
    model = make_model(tokenizer.get_vocab_size())
    run = base / "base_checkpoints" / "tiny"
    tokenizer.save(run / "tokenizer")
    state = dict(model_config=vars(model.config), tokens=str(tokens), tokenizer=tokenizer.fingerprint(), val_bpb=None,
                 user_config=dict(eval_tokens=2000, device_batch_size=2, data=str(text)))
    for step in (10, 20):
        save_checkpoint(run, step, model.state_dict(), {}, state)
    return base


def script(name, *args, base_dir, stdin="", ok=True):
    """Run a script as a user would; returns (stdout, stderr)."""
    done = python_m(f"scripts.{name}", *args, stdin=stdin, NANOCHAT_BASE_DIR=str(base_dir), NANOCHAT_DTYPE="float32")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (0 if ok else 2), done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_sample_continues_each_prompt(base_dir, tokenizer):
    model = make_model(tokenizer.get_vocab_size())
    expected = ""
    for prompt in ("def add", "größer "):
        (sequence,), _ = Engine(model, tokenizer).generate_batch(tokenizer(prompt, prepend="<|bos|>"), max_tokens=12,
                                                                 temperature=0)
        expected += tokenizer.decode(sequence[1:]) + "\n"
    out, err = script("sample", "-p", "def add", "--prompt", "größer ", "--max-tokens", "12", "--temperature", "0",
                      base_dir=base_dir)
    assert out == expected and "tiny, step 20" in err


@pytest.mark.slow
def test_sample_reads_standard_input_and_draws_several(base_dir):
    out, _ = script("sample", "--num-samples", "2", "--max-tokens", "4", "--step", "10", base_dir=base_dir,
                    stdin="two\nlines\n")
    assert out.count("two\nlines") == 2 and "sample 2 of 2" in out


@pytest.mark.slow
def test_chat_cli_completes_in_a_loop_and_chats_on_request(base_dir, tokenizer):
    engine = Engine(make_model(tokenizer.get_vocab_size()), tokenizer)
    expected = ["".join(engine.stream_text(tokenizer(text, prepend="<|bos|>"), max_tokens=3, temperature=0))
                for text in ("def add", "b")]
    typed = "def add\n\nclear\nb\nquit\nnever read\n"
    out, err = script("chat_cli", "--max-tokens", "3", "--temperature", "0", base_dir=base_dir, stdin=typed)
    assert out == "".join(text + "\n" for text in expected) and "--chat" in err
    chat, err = script("chat_cli", "--chat", "-p", "hello", "--max-tokens", "3", base_dir=base_dir)
    assert chat.endswith("\n") and "base model" in err


@pytest.mark.slow
def test_base_eval_prints_a_table_and_leaves_a_record(base_dir):
    out, err = script("base_eval", "--eval", "bpb,sample", base_dir=base_dir)
    record = json.loads((base_dir / "base_checkpoints/tiny/eval_000020.json").read_text())
    assert "bits per byte, val" in out and len(record["samples"]) == 5 and record["step"] == 20
    assert record["bpb"]["train"] > 1 and record["bpb"]["val"] > 1
    script("base_eval", "--eval", "bpb", "--device-batch-size", "5", base_dir=base_dir)
    again = json.loads((base_dir / "base_checkpoints/tiny/eval_000020.json").read_text())
    assert again["samples"] == record["samples"]  # what was not redone is kept
    assert again["bpb"]["val"] == pytest.approx(record["bpb"]["val"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, args, words", [
    ("sample", ("--model-tag", "nope", "-p", "x"), "tiny"),
    ("sample", ("--step", "15", "-p", "x"), "10, 20"),
    ("sample", ("-p",), "expected at least one argument"),
    ("chat_cli", ("--chat", "--complete", "--top-k", "-1"), "--top-k must be at least 0"),
    ("base_eval", ("--eval", "bpb,cor", "--max-per-task", "0"), "not 'cor'"),
])
def test_scripts_refuse_what_is_wrong(base_dir, name, args, words):
    _, err = script(name, *args, base_dir=base_dir, ok=False)
    assert words in err
