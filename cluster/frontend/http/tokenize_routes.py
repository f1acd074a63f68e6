"""POST /tokenize and /detokenize, with vLLM's shapes. Knows shapes and FastAPI; the service knows the tokens."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from cluster.frontend.generation.service import GenerationService
from cluster.frontend.http.body import read_body
from cluster.frontend.openai_api.routes import check_model, json_response
from cluster.frontend.openai_api.schema import DetokenizeRequest, TokenizeRequest
from cluster.model.info import ModelInfo


class TokenizeRoutes:
    """Text to token ids and back, for clients that count or build prompts themselves."""

    def __init__(self, service: GenerationService, info: ModelInfo) -> None:
        self._service = service
        self._info = info

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: of a prompt, or of the messages of a chat as the chat endpoint would see them."""
        body = await read_body(request, TokenizeRequest)
        check_model(body.model, self._info)
        if body.messages is not None:
            tokens = await self._service.encode_chat(
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.opens_answer,
                continue_final_message=bool(body.continue_final_message),
                tools=body.tools,
                kwargs=body.chat_template_kwargs,
                add_special_tokens=bool(body.add_special_tokens),
            )
        else:
            with_special = body.add_special_tokens is not False
            tokens = await self._service.encode_text(body.prompt or "", add_special_tokens=with_special)
        pieces = await self._service.token_pieces(tokens) if body.return_token_strs else None
        facts = {"count": len(tokens), "max_model_len": self._info.max_model_len}
        return json_response({**facts, "tokens": list(tokens), "token_strs": pieces})

    async def tokenizer_info(self) -> Response:
        """GET /tokenizer_info: the checkpoint's tokenizer settings and chat template."""
        return json_response(self._service.tokenizer_facts)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids, special tokens included."""
        body = await read_body(request, DetokenizeRequest)
        check_model(body.model, self._info)
        return json_response({"prompt": await self._service.decode(body.tokens, skip_special_tokens=False)})
