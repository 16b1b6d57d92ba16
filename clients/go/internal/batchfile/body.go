package batchfile

import (
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
)

var roles = map[string]pb.Role{
	"system":    pb.Role_ROLE_SYSTEM,
	"developer": pb.Role_ROLE_SYSTEM, // OpenAI's newer name for it
	"user":      pb.Role_ROLE_USER,
	"assistant": pb.Role_ROLE_ASSISTANT,
}

// The field that each OpenAI address asks with.
var fieldOf = map[string]string{"/v1/chat/completions": "messages", "/v1/completions": "prompt"}

// Options that OpenAI writes beside the messages, and what the contract calls them.
var openAIOptions = []struct{ theirs, ours string }{
	{"max_tokens", "num_predict"},
	{"max_completion_tokens", "num_predict"},
	{"temperature", "temperature"},
	{"top_p", "top_p"},
	{"seed", "seed"},
	{"stop", "stop"},
	{"presence_penalty", "presence_penalty"},
	{"frequency_penalty", "frequency_penalty"},
}

// itemOf reads a line in either form, its id left out.
func itemOf(f *fields) *pb.Item {
	if !f.has("body") && !f.has("url") && !f.has("method") {
		return readBody(f, true)
	}
	if method := f.text("method"); method != "" && method != "POST" {
		f.refuse("method", "must be POST")
	}
	field, isKnown := fieldOf[f.text("url")]
	body := f.child("body")
	switch {
	case !isKnown:
		f.refuse("url", "must be /v1/chat/completions or /v1/completions")
	case !body.has(field):
		body.refuse(field, "is missing")
	}
	item := readBody(body, false)
	body.end()
	return item
}

// readBody reads what is asked. A plain line may have its system prompt beside the messages.
func readBody(f *fields, isPlain bool) *pb.Item {
	item := &pb.Item{Model: f.text("model")}
	switch {
	case f.has("messages") && f.has("prompt"):
		f.refuse("prompt", "stands beside messages; a line is one of them")
	case f.has("messages"):
		chat := &pb.ChatRequest{}
		if isPlain && f.has("system") {
			chat.Messages = append(chat.Messages, &pb.Message{Role: pb.Role_ROLE_SYSTEM, Content: f.text("system")})
		}
		chat.Messages = append(chat.Messages, readMessages(f)...)
		chat.Format = readFormat(f)
		item.Request = &pb.Item_Chat{Chat: chat}
	case f.has("prompt"):
		generate := &pb.GenerateRequest{System: f.text("system"), Raw: f.flag("raw")}
		if generate.Prompt = f.text("prompt"); generate.Prompt == "" {
			f.refuse("prompt", "is empty")
		}
		generate.Format = readFormat(f)
		item.Request = &pb.Item_Generate{Generate: generate}
	default:
		f.refuse("", "has neither messages nor a prompt")
	}
	if options := readOptions(f); proto.Size(options) > 0 {
		item.Options = options
	}
	return item
}

func readMessages(f *fields) []*pb.Message {
	list := f.children("messages")
	if len(list) == 0 {
		f.refuse("messages", "must hold at least one message")
	}
	messages := make([]*pb.Message, 0, len(list))
	for _, each := range list {
		role, isKnown := roles[each.text("role")]
		if !isKnown {
			each.refuse("role", "must be system, developer, user or assistant")
		}
		if !each.has("content") {
			each.refuse("content", "is missing")
		}
		messages = append(messages, &pb.Message{Role: role, Content: each.text("content")})
		each.end()
	}
	return messages
}

// readFormat reads how the answer must be shaped: Ollama's `format` or OpenAI's `response_format`; nil for free text.
func readFormat(f *fields) *pb.ResponseFormat {
	if f.has("format") && f.has("response_format") {
		f.refuse("response_format", "says again what format says")
	}
	if schema := f.take("format"); schema != nil {
		return formatOf(f, "format", schema)
	}
	format := f.child("response_format")
	switch kind := format.text("type"); kind {
	case "", "text":
	case "json_object":
		format.end()
		return &pb.ResponseFormat{Kind: &pb.ResponseFormat_Json{Json: true}}
	case "json_schema":
		// Beside the schema stand a name, a description and `strict`, which change nothing here.
		inner := format.child("json_schema")
		format.end()
		return formatOf(inner, "schema", inner.take("schema"))
	default:
		format.refuse("type", fmt.Sprintf("must be text, json_object or json_schema, not %q", kind))
	}
	format.end()
	return nil
}

func formatOf(f *fields, name string, value json.RawMessage) *pb.ResponseFormat {
	if string(value) == `"json"` {
		return &pb.ResponseFormat{Kind: &pb.ResponseFormat_Json{Json: true}}
	}
	if len(value) == 0 || value[0] != '{' {
		f.refuse(name, "must be a JSON schema")
	}
	return &pb.ResponseFormat{Kind: &pb.ResponseFormat_JsonSchema{JsonSchema: string(value)}}
}

// readOptions reads Ollama's `options`, and OpenAI's beside it. The contract says which there are, and their types.
func readOptions(f *fields) *pb.Options {
	options := &pb.Options{}
	ofAnswer := options.ProtoReflect().Descriptor().Fields()
	ofRunner := (&pb.RunnerOptions{}).ProtoReflect().Descriptor().Fields()
	inner := f.child("options")
	said := map[string]bool{}
	for _, name := range inner.names() {
		field := ofAnswer.ByTextName(name)
		switch {
		case ofRunner.ByTextName(name) != nil:
			runner := &pb.RunnerOptions{}
			setOption(inner, name, name, runner)
			proto.Merge(options, &pb.Options{Runner: runner})
		case field != nil && field.Message() == nil && name != "extra_options_json":
			said[name] = true
			setOption(inner, name, name, options)
		}
	}
	inner.end()
	for _, each := range openAIOptions {
		if !f.has(each.theirs) {
			continue
		}
		if said[each.ours] {
			f.refuse(each.theirs, "says again what is said elsewhere; write one of them")
		}
		said[each.ours] = true
		setOption(f, each.theirs, each.ours, options)
	}
	return options
}

// setOption takes the field `name` for the option that the contract calls `ours`.
func setOption(f *fields, name, ours string, options proto.Message) {
	value := f.take(name)
	if ours == "stop" && value[0] == '"' {
		value = fmt.Appendf(nil, "[%s]", value)
	}
	one := options.ProtoReflect().New().Interface()
	if protojson.Unmarshal(fmt.Appendf(nil, `{%q: %s}`, ours, value), one) != nil {
		f.refuse(name, fmt.Sprintf("cannot be %s", value))
		return
	}
	proto.Merge(options, one)
}
