package batchfile

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
)

// read gives the one item of a line, or what is wrong with it.
func read(t *testing.T, line string) (*pb.Item, string) {
	t.Helper()
	item, err := NewReader(strings.NewReader(line)).Next()
	if wrong := (*LineError)(nil); errors.As(err, &wrong) {
		return nil, wrong.Problem
	}
	if err != nil {
		t.Fatal(err)
	}
	return item, ""
}

func TestEachFormBecomesItsItem(t *testing.T) {
	for line, want := range map[string]string{
		`{"id": "a", "prompt": "Hi", "raw": true, "options": {"num_predict": 5, "temperature": 0, "seed": -1}}`: `
			item_id: "a" generate { prompt: "Hi" raw: true } options { num_predict: 5 temperature: 0 seed: -1 }`,
		`{"messages": [{"role": "user", "content": "Hi"}], "system": "Be kind", "model": "m", "options": {"num_ctx": 64}}`: `
			item_id: "line-1" model: "m" options { runner { num_ctx: 64 } }
			chat { messages { role: ROLE_SYSTEM content: "Be kind" } messages { role: ROLE_USER content: "Hi" } }`,
		`{"id": 7, "prompt": "Hi", "format": {"type": "object"}, "options": {"stop": "x"}}`: `
			item_id: "7" generate { prompt: "Hi" format { json_schema: "{\"type\": \"object\"}" } } options { stop: "x" }`,
		`{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {
			"messages": [{"role": "developer", "content": ""}], "max_tokens": 4, "stop": ["x", "y"], "seed": null,
			"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}}`: `
			item_id: "b" options { num_predict: 4 stop: "x" stop: "y" }
			chat { messages { role: ROLE_SYSTEM } format { json_schema: "{}" } }`,
		`{"url": "/v1/completions", "body": {"prompt": "Hi", "max_completion_tokens": 4}}`: `
			item_id: "line-1" generate { prompt: "Hi" } options { num_predict: 4 }`,
	} {
		got, problem := read(t, strings.ReplaceAll(line, "\n", " "))
		wanted := &pb.Item{}
		if err := prototext.Unmarshal([]byte(want), wanted); err != nil {
			t.Fatal(err)
		}
		if problem != "" || !proto.Equal(got, wanted) {
			t.Errorf("%s\n gives %v (%s)\n  not %v", line, got, problem, wanted)
		}
	}
}

func TestWhatIsWrongIsNamed(t *testing.T) {
	for line, want := range map[string]string{
		`{"prompt"`:                         "not JSON",
		`{"prompt": "a"} {}`:                "something follows",
		`["prompt"]`:                        "must be a JSON object",
		`null`:                              "must be a JSON object",
		"{\"prompt\": \"\xff\"}":            "not UTF-8",
		`{}`:                                "neither messages nor a prompt",
		`{"prompt": ""}`:                    "prompt: is empty",
		`{"prompt": 5}`:                     "prompt: must be text",
		`{"prompt": "a", "messages": [{}]}`: "prompt: stands beside messages",
		`{"prompt": "a", "promt": "b"}`:     "promt: not known here",
		`{"prompt": "a", "id": ""}`:         "id: is empty",
		`{"prompt": "a", "id": "\n"}`:       "id: must not hold control characters",
		`{"prompt": "a", "id": true}`:       "id: must be text",
		`{"prompt": "a", "id": "x", "custom_id": "y"}`: "custom_id: says again",
		`{"messages": []}`: "messages: must hold",
		`{"messages": [{"role": "user", "content": "a"}, 1]}`:                          "messages[1]: must be a JSON object",
		`{"messages": [{"role": "me", "content": "a"}]}`:                               "messages[0].role: must be",
		`{"messages": [{"role": "user"}]}`:                                             "messages[0].content: is missing",
		`{"prompt": "a", "options": {"num_predict": 1.5}}`:                             "options.num_predict: cannot be 1.5",
		`{"prompt": "a", "options": {"nun_predict": 1}}`:                               "options.nun_predict: not known here",
		`{"prompt": "a", "options": {"seed": 1}, "seed": 2}`:                           "seed: says again",
		`{"url": "/v1/embeddings", "body": {"input": "a"}}`:                            "url: must be",
		`{"url": "/v1/completions", "method": "GET", "body": {"prompt": "a"}}`:         "method: must be POST",
		`{"url": "/v1/completions", "body": {"messages": []}}`:                         "body.prompt: is missing",
		`{"url": "/v1/completions", "body": {"prompt": "a", "n": 2}}`:                  "body.n: not known here",
		`{"prompt": "a", "response_format": {"type": "xml"}}`:                          "response_format.type: must be",
		`{"prompt": "a", "response_format": {"type": "json_schema"}}`:                  "response_format.json_schema.schema: must be",
		`{"prompt": "a", "id": "` + strings.Repeat("x", 257) + `"}`:                    "id: is longer than 256 bytes",
		`{"prompt": "` + strings.Repeat("x", maxLineBytes) + `"}` + "\n{\"prompt\":1}": "is longer than",
	} {
		if _, problem := read(t, line); !strings.Contains(problem, want) {
			t.Errorf("%.80s\n gives %q,\n  not %q", line, problem, want)
		}
	}
}

func TestABadLineCostsOnlyItself(t *testing.T) {
	lines := NewReader(strings.NewReader("{\"prompt\": \"a\"}\n\nbad\n{\"id\": \"line-1\", \"prompt\": \"b\"}\n{\"prompt\": \"c\"}"))
	var got []string
	for {
		item, err := lines.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			got = append(got, err.Error()[:7])
		} else {
			got = append(got, item.ItemId)
		}
	}
	if want := "line-1, line 3:, line 4:, line-5"; strings.Join(got, ", ") != want {
		t.Errorf("%v is not %s", got, want)
	}
}

func TestTheExampleBatchIsRead(t *testing.T) {
	file, err := os.Open("../../../../service/unisono/examples/batch.jsonl")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the module stands alone, without the service's example")
	}
	defer func() { _ = file.Close() }()
	count := 0
	for lines := NewReader(file); ; count++ {
		if _, err = lines.Next(); err != nil {
			break
		}
	}
	if !errors.Is(err, io.EOF) || count != 24 {
		t.Errorf("%d items, then %v", count, err)
	}
}
