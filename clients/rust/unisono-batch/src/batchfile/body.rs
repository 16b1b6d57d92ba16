use unisono_client::v1::item::Request;
use unisono_client::v1::response_format::Kind;
use unisono_client::v1::{ChatRequest, GenerateRequest, Item, Message, ResponseFormat, Role};

use super::fields::{Fields, Problem};
use super::options::options_of;

/// Reads a line in either form, its id left out.
pub(super) fn item_of(fields: &mut Fields) -> Result<Item, Problem> {
    if !["body", "url", "method"].iter().any(|name| fields.has(name)) {
        return read(fields, Form::Plain);
    }
    if fields.has("method") && fields.text("method")? != "POST" {
        return Err(fields.problem("method", "must be POST"));
    }
    let asked = match fields.text("url")?.as_str() {
        "/v1/chat/completions" => "messages",
        "/v1/completions" => "prompt",
        _ => return Err(fields.problem("url", "must be /v1/chat/completions or /v1/completions")),
    };
    let mut body = fields.child("body")?;
    if !body.has(asked) {
        return Err(body.problem(asked, "is missing"));
    }
    let item = read(&mut body, Form::OpenAi)?;
    body.end()?;
    Ok(item)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// The system prompt may stand beside the messages.
    Plain,
    OpenAi,
}

/// Reads what is asked.
fn read(fields: &mut Fields, form: Form) -> Result<Item, Problem> {
    let model = fields.text("model")?;
    let request = match (fields.has("messages"), fields.has("prompt")) {
        (true, true) => return Err(fields.problem("prompt", "stands beside messages; a line is one of them")),
        (true, false) => Request::Chat(chat_of(fields, form)?),
        (false, true) => Request::Generate(generate_of(fields)?),
        (false, false) => return Err(fields.problem("", "has neither messages nor a prompt")),
    };
    Ok(Item { model, request: Some(request), options: options_of(fields)?, ..Item::default() })
}

fn chat_of(fields: &mut Fields, form: Form) -> Result<ChatRequest, Problem> {
    let mut messages = messages_of(fields)?;
    if form == Form::Plain && fields.has("system") {
        messages.insert(0, message(Role::System, fields.text("system")?));
    }
    Ok(ChatRequest { messages, format: format_of(fields)?, ..ChatRequest::default() })
}

fn generate_of(fields: &mut Fields) -> Result<GenerateRequest, Problem> {
    let prompt = fields.text("prompt")?;
    if prompt.is_empty() {
        return Err(fields.problem("prompt", "is empty"));
    }
    Ok(GenerateRequest {
        prompt,
        system: fields.text("system")?,
        raw: fields.flag("raw")?,
        format: format_of(fields)?,
        ..GenerateRequest::default()
    })
}

fn messages_of(fields: &mut Fields) -> Result<Vec<Message>, Problem> {
    let list = fields.children("messages")?;
    if list.is_empty() {
        return Err(fields.problem("messages", "must hold at least one message"));
    }
    list.into_iter().map(message_of).collect()
}

fn message_of(mut fields: Fields) -> Result<Message, Problem> {
    let role = match fields.text("role")?.as_str() {
        "system" | "developer" => Role::System, // the second is OpenAI's newer name for it
        "user" => Role::User,
        "assistant" => Role::Assistant,
        _ => return Err(fields.problem("role", "must be system, developer, user or assistant")),
    };
    if !fields.has("content") {
        return Err(fields.problem("content", "is missing"));
    }
    let content = fields.text("content")?;
    fields.end()?;
    Ok(message(role, content))
}

fn message(role: Role, content: String) -> Message {
    Message { role: role.into(), content, ..Message::default() }
}

/// Reads how the answer must be shaped: Ollama's `format` or OpenAI's `response_format`; nothing for free text.
fn format_of(fields: &mut Fields) -> Result<Option<ResponseFormat>, Problem> {
    if fields.has("format") && fields.has("response_format") {
        return Err(fields.problem("response_format", "says again what format says"));
    }
    if fields.has("format") {
        return schema_of(fields, "format").map(Some);
    }
    let mut format = fields.child("response_format")?;
    let found = match format.text("type")?.as_str() {
        "" | "text" => None,
        "json_object" => Some(ResponseFormat { kind: Some(Kind::Json(true)) }),
        // Beside the schema stand a name, a description and `strict`, which change nothing here.
        "json_schema" => Some(schema_of(&mut format.child("json_schema")?, "schema")?),
        kind => {
            let problem = format!("must be text, json_object or json_schema, not {kind:?}");
            return Err(format.problem("type", &problem));
        }
    };
    format.end()?;
    Ok(found)
}

fn schema_of(fields: &mut Fields, name: &str) -> Result<ResponseFormat, Problem> {
    let schema = fields.take(name);
    let kind = match schema.as_ref().map(|schema| schema.get()) {
        Some("\"json\"") => Kind::Json(true),
        Some(schema) if schema.starts_with('{') => Kind::JsonSchema(schema.to_owned()),
        _ => return Err(fields.problem(name, "must be a JSON schema")),
    };
    Ok(ResponseFormat { kind: Some(kind) })
}
