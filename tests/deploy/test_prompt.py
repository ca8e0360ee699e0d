import asyncio
import threading

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.deploy import errors
from kvferry.deploy.prompt import MAX_CHAT_MESSAGES, PromptEncoder
from kvferry.proto import inference_pb2

LIMIT = 1000
VOCAB_SIZE = 49152


@pytest.fixture
def prompts(tokenizer):
    encoder = PromptEncoder(tokenizer, vocab_size=VOCAB_SIZE, max_prompt_bytes=LIMIT)
    yield encoder
    encoder.close()


def text(value):
    return inference_pb2.GenerateRequest(text=value)


def chat(*messages, request=inference_pb2.GenerateRequest):
    return request(
        chat=inference_pb2.ChatMessages(
            messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
        )
    )


def ids(values):
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=values))


async def test_text_is_taken_as_it_is(prompts, tokenizer):
    assert await prompts.encode(text("Hello 汉字 🤖")) == tokenizer.encode("Hello 汉字 🤖")


async def test_chat_goes_through_the_template(prompts, tokenizer):
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    token_ids = await prompts.encode(chat(*messages))
    assert tokenizer.decode(token_ids).endswith("<|im_start|>assistant\n")
    assert token_ids == tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        return_dict=False,
    )


async def test_count_requests_encode_alike(prompts):
    messages = [("user", "Hi")]
    count = chat(*messages, request=inference_pb2.CountTokensRequest)
    assert await prompts.encode(count) == await prompts.encode(chat(*messages))


async def test_token_ids_pass(prompts):
    assert await prompts.encode(ids([5, 0, VOCAB_SIZE - 1])) == [5, 0, VOCAB_SIZE - 1]


@pytest.mark.parametrize(
    ("request_", "error", "sentence"),
    [
        pytest.param(inference_pb2.GenerateRequest(), errors.EmptyPrompt, "has no prompt", id="none"),
        pytest.param(text(""), errors.EmptyPrompt, "prompt is empty", id="empty-text"),
        pytest.param(ids([]), errors.EmptyPrompt, "prompt is empty", id="empty-ids"),
        pytest.param(chat(), errors.EmptyPrompt, "no messages", id="empty-chat"),
        pytest.param(chat(("tool", "x")), errors.UnknownRole, r"messages\[0\].role", id="role"),
        pytest.param(chat(("user", "x"), ("", "x")), errors.UnknownRole, r"messages\[1\].role", id="no-role"),
        pytest.param(ids([1, VOCAB_SIZE]), errors.TokenIdOutOfVocabulary, r"token_ids\[1\] is 49152", id="id"),
        pytest.param(text("x" * (LIMIT + 1)), errors.PromptTooLong, "1,001 bytes; at most 1,000", id="text"),
        pytest.param(text("汉" * 334), errors.PromptTooLong, "1,002 bytes; at most 1,000", id="utf8-bytes"),
        pytest.param(ids([1] * 251), errors.PromptTooLong, "1,004 bytes; at most 1,000", id="ids"),
        pytest.param(
            chat(("user", "x" * 600), ("assistant", "x" * 401)), errors.PromptTooLong, "1,001 bytes", id="chat"
        ),
        pytest.param(
            chat(*[("user", "")] * (MAX_CHAT_MESSAGES + 1)), errors.PromptTooLong, "4,097 messages", id="messages"
        ),
    ],
)
async def test_refused(prompts, request_, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        await prompts.encode(request_)
    assert errors.status_code(caught.value) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("request_", [text("x" * LIMIT), ids([1] * 250), chat(("user", "x" * LIMIT)), text("\0")])
async def test_at_the_limit(prompts, request_):
    assert await prompts.encode(request_)


def test_oversize_is_refused_before_tokenizing(tokenizer):
    class NeverEncodes:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        chat_template = "template"

        def encode(self, value):
            assert not value

    encoder = PromptEncoder(NeverEncodes(), vocab_size=VOCAB_SIZE, max_prompt_bytes=LIMIT)
    with pytest.raises(errors.PromptTooLong):
        encoder.check(text("x" * 10 * LIMIT))
    encoder.close()


def test_lone_surrogates(prompts):
    class Request:  # protobuf refuses them; Python callers may not
        text = "a\ud800b"

        def WhichOneof(self, name):
            return "text"

    with pytest.raises(errors.PromptNotUnicode, match="text holds lone surrogates"):
        prompts.check(Request())


def stand_in(encode=lambda value: [1], template="template", render=None):
    class StandIn:
        chat_template = template

        def encode(self, value):
            return encode(value) if value else []

        def apply_chat_template(self, conversation, **options):
            return render(conversation)

    return PromptEncoder(StandIn(), vocab_size=VOCAB_SIZE, max_prompt_bytes=LIMIT)


async def test_model_without_a_chat_template():
    with pytest.raises(errors.NoChatTemplate, match="no chat template") as caught:
        await stand_in(template=None).encode(chat(("user", "Hi")))
    assert errors.status_code(caught.value) == grpc.StatusCode.FAILED_PRECONDITION


async def test_template_that_refuses_does_not_quote_the_conversation():
    from jinja2.exceptions import TemplateError

    def render(conversation):
        raise TemplateError(f"bad: {conversation}")

    with pytest.raises(errors.InvalidRequest, match="roles in order: user, user") as caught:
        await stand_in(render=render).encode(chat(("user", "secret"), ("user", "secret")))
    assert "secret" not in str(caught.value)


async def test_tokenizer_that_panics_does_not_quote_the_prompt():
    class PanicException(BaseException):
        pass

    def encode(value):
        raise PanicException(value)

    with pytest.raises(RuntimeError, match="PanicException") as caught:
        await stand_in(encode).encode(text("secret"))
    assert "secret" not in str(caught.value)


async def test_prompt_without_tokens():
    with pytest.raises(errors.EmptyPrompt, match="no tokens"):
        await stand_in(lambda value: []).encode(text("\u200b"))


async def test_the_event_loop_goes_on():
    """While a prompt is encoded: only the loop can end this one."""
    go_on = threading.Event()

    def encode(value):
        return [1] if go_on.wait(20) else [2]

    running = asyncio.create_task(stand_in(encode).encode(text("x")))
    await asyncio.sleep(0.05)
    assert not running.done()
    go_on.set()
    assert await running == [1]


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=100)
@given(st.text(max_size=200))
def test_any_text_is_tokenized_or_refused(prompts, value):
    async def encode():
        try:
            token_ids = await prompts.encode(text(value))
        except errors.InvalidRequest:
            return
        assert token_ids and max(token_ids) < VOCAB_SIZE

    asyncio.run(encode())


def test_every_error_has_a_status():
    for name in errors.__all__:
        if isinstance(cls := getattr(errors, name), type) and cls is not errors.RequestError:
            error = cls("x", retry_after_ms=1) if cls is errors.Overloaded else cls("x")
            assert isinstance(errors.status_code(error), grpc.StatusCode)
            assert (errors.status_code(error) == grpc.StatusCode.INTERNAL) == (cls is errors.WorkerFailed)


def test_exports_are_sorted():
    assert errors.__all__ == sorted(errors.__all__)
