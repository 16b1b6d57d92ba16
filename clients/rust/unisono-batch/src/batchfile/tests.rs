use unisono_client::v1::item::Request;
use unisono_client::v1::response_format::Kind;
use unisono_client::v1::{
    ChatRequest, GenerateRequest, Item, Message, Options, ResponseFormat, Role, RunnerOptions,
};

use super::{BatchReader, MAX_LINE_BYTES, ReadError};

fn read(file: &[u8]) -> Vec<Result<Item, ReadError>> {
    BatchReader::new(file).collect()
}

fn message(role: Role, content: &str) -> Message {
    Message { role: role.into(), content: content.into(), ..Message::default() }
}

fn chat(messages: Vec<Message>, schema: Option<&str>) -> Request {
    Request::Chat(ChatRequest { messages, format: schema.map(json_schema), ..ChatRequest::default() })
}

fn generate(prompt: &str, more: GenerateRequest) -> Request {
    Request::Generate(GenerateRequest { prompt: prompt.into(), ..more })
}

fn json_schema(schema: &str) -> ResponseFormat {
    ResponseFormat { kind: Some(Kind::JsonSchema(schema.into())) }
}

#[test]
fn each_form_becomes_its_item() {
    let cases = [
        (
            r#"{"id": "a", "prompt": "Hi", "raw": true, "options": {"num_predict": 5, "temperature": 0, "seed": -1}}"#,
            Item {
                item_id: "a".into(),
                request: Some(generate("Hi", GenerateRequest { raw: true, ..Default::default() })),
                options: Some(Options {
                    num_predict: Some(5),
                    temperature: Some(0.0),
                    seed: Some(-1),
                    ..Default::default()
                }),
                ..Default::default()
            },
        ),
        (
            r#"{"messages": [{"role": "user", "content": "Hi"}], "system": "Be kind", "model": "m", "options": {"num_ctx": 64}}"#,
            Item {
                item_id: "line-1".into(),
                model: "m".into(),
                request: Some(chat(vec![message(Role::System, "Be kind"), message(Role::User, "Hi")], None)),
                options: Some(Options {
                    runner: Some(RunnerOptions { num_ctx: Some(64), ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            },
        ),
        // Keys keep their order, and the seed its last digits.
        (
            r#"{"id": 7, "prompt": "Hi", "format": {"b": 1.0, "1": ["}"]}, "options": {"stop": "x", "seed": 9007199254740993}}"#,
            Item {
                item_id: "7".into(),
                request: Some(generate(
                    "Hi",
                    GenerateRequest {
                        format: Some(json_schema(r#"{"b": 1.0, "1": ["}"]}"#)),
                        ..Default::default()
                    },
                )),
                options: Some(Options {
                    stop: vec!["x".into()],
                    seed: Some(9_007_199_254_740_993),
                    ..Default::default()
                }),
                ..Default::default()
            },
        ),
        (
            r#"{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {
                "messages": [{"role": "developer", "content": ""}], "max_tokens": 4, "stop": ["x", "y"], "seed": null,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}}"#,
            Item {
                item_id: "b".into(),
                request: Some(chat(vec![message(Role::System, "")], Some("{}"))),
                options: Some(Options {
                    num_predict: Some(4),
                    stop: vec!["x".into(), "y".into()],
                    ..Default::default()
                }),
                ..Default::default()
            },
        ),
        (
            r#"{"url": "/v1/completions", "body": {"prompt": "Hi", "max_completion_tokens": 4}}"#,
            Item {
                item_id: "line-1".into(),
                request: Some(generate("Hi", GenerateRequest::default())),
                options: Some(Options { num_predict: Some(4), ..Default::default() }),
                ..Default::default()
            },
        ),
        // Escapes in a name are no other name.
        (
            r#"{"pr\u006fmpt": "Hi\\\"}, {\\", "id": "\\"}"#,
            Item {
                item_id: "\\".into(),
                request: Some(generate("Hi\\\"}, {\\", GenerateRequest::default())),
                ..Default::default()
            },
        ),
    ];
    for (line, item) in cases {
        let items = read(line.replace('\n', " ").as_bytes());
        assert_eq!(items.into_iter().collect::<Result<Vec<_>, _>>().unwrap(), [item], "{line}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let long_id = format!(r#"{{"prompt": "a", "id": "{}"}}"#, "x".repeat(257));
    let long_line = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(MAX_LINE_BYTES));
    let cases: [(&[u8], &str); 38] = [
        (br#"{"prompt""#, "not JSON: EOF"),
        (br#"{"prompt": "a"} {}"#, "not JSON: trailing characters, at column 17"),
        (br#"["prompt"]"#, "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{\"prompt\": \"\xff\"}", "is not UTF-8"),
        (b"{}", "has neither messages nor a prompt"),
        (br#"{"prompt": ""}"#, "prompt: is empty"),
        (br#"{"prompt": 5}"#, "prompt: must be text"),
        (br#"{"prompt": "a", "raw": 1}"#, "raw: must be true or false"),
        (br#"{"prompt": "a", "messages": [{}]}"#, "prompt: stands beside messages"),
        (br#"{"prompt": "a", "promt": "b"}"#, "promt: not known here"),
        (br#"{"prompt": "a", "id": ""}"#, "id: is empty"),
        (br#"{"prompt": "a", "id": "\n"}"#, "id: must not hold control characters"),
        (br#"{"prompt": "a", "id": true}"#, "id: must be text"),
        (br#"{"prompt": "a", "id": "x", "custom_id": "y"}"#, "custom_id: says again"),
        (br#"{"messages": []}"#, "messages: must hold"),
        (br#"{"messages": {}}"#, "messages: must be a list"),
        (br#"{"messages": [{"role": "user", "content": "a"}, 1]}"#, "messages[1]: must be a JSON object"),
        (br#"{"messages": [{"role": "me", "content": "a"}]}"#, "messages[0].role: must be"),
        (br#"{"messages": [{"role": "user"}]}"#, "messages[0].content: is missing"),
        (br#"{"prompt": "a", "options": 5}"#, "options: must be a JSON object"),
        (br#"{"prompt": "a", "options": {"num_predict": 1.5}}"#, "options.num_predict: cannot be 1.5"),
        (br#"{"prompt": "a", "options": {"num_ctx": -1}}"#, "options.num_ctx: cannot be -1"),
        (
            br#"{"prompt": "a", "options": {"seed": 9223372036854775808}}"#,
            "options.seed: cannot be 9223372036854775808",
        ),
        (br#"{"prompt": "a", "options": {"temperature": 1e39}}"#, "options.temperature: cannot be 1e39"),
        (br#"{"prompt": "a", "options": {"stop": [1]}}"#, "options.stop: cannot be [1]"),
        (br#"{"prompt": "a", "options": {"nun_predict": 1}}"#, "options.nun_predict: not known here"),
        (br#"{"prompt": "a", "options": {"seed": 1}, "seed": 2}"#, "seed: says again"),
        (br#"{"prompt": "a", "options": {"stop": []}, "stop": "x"}"#, "stop: says again"),
        (br#"{"url": "/v1/embeddings", "body": {"input": "a"}}"#, "url: must be"),
        (br#"{"url": "/v1/completions", "method": "GET", "body": {"prompt": "a"}}"#, "method: must be POST"),
        (br#"{"url": "/v1/completions", "body": {"messages": []}}"#, "body.prompt: is missing"),
        (br#"{"url": "/v1/completions", "body": {"prompt": "a", "n": 2}}"#, "body.n: not known here"),
        (br#"{"prompt": "a", "format": "json", "response_format": {}}"#, "response_format: says again"),
        (br#"{"prompt": "a", "response_format": {"type": "xml"}}"#, "response_format.type: must be"),
        (
            br#"{"prompt": "a", "response_format": {"type": "json_schema"}}"#,
            "response_format.json_schema.schema: must be",
        ),
        (long_id.as_bytes(), "id: is longer than 256 bytes"),
        (long_line.as_bytes(), "is longer than 16777216 bytes"),
    ];
    for (line, told) in cases {
        let shown = String::from_utf8_lossy(&line[..line.len().min(80)]);
        match read(line).as_slice() {
            [Err(ReadError::Line { line: 1, problem })] => {
                assert!(problem.to_string().starts_with(told), "{shown}: {problem}");
            }
            other => panic!("{shown}: {other:?}"),
        }
    }
}

#[test]
fn a_bad_line_costs_only_itself() {
    let long = "x".repeat(MAX_LINE_BYTES + 1);
    let file = format!(
        "{{\"prompt\": \"é\"}}\n\nbad\n{{\"id\": \"line-1\", \"prompt\": \"b\"}}\r\n{long}\n{{\"prompt\": \"c\"}}"
    );
    let named: Vec<_> = read(file.as_bytes())
        .into_iter()
        .map(|each| each.map_or_else(|error| error.to_string()[..7].to_owned(), |item| item.item_id))
        .collect();
    assert_eq!(named, ["line-1", "line 3:", "line 4:", "line 5:", "line-6"]);
}

#[test]
fn the_example_batch_is_read() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../service/unisono/examples/batch.jsonl");
    let items = read(&std::fs::read(example).unwrap());
    assert_eq!(items.into_iter().collect::<Result<Vec<_>, _>>().unwrap().len(), 24);
}
