package main

import (
	"encoding/json"
	"io"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
)

const refused = "REFUSED"

// line is a result as it is written.
type line struct {
	ID string `json:"id"`
	// The item's own id, for one of several answers.
	VariantOf string   `json:"variant_of,omitempty"`
	State     string   `json:"state"`
	Content   *string  `json:"content,omitempty"`
	Error     *problem `json:"error,omitempty"`
}

type problem struct {
	// For programs: one of the README's list. Empty where the status has none.
	Reason  string `json:"reason"`
	Code    int32  `json:"code"`
	Message string `json:"message"`
}

func problemOf(status *rpcstatus.Status) *problem {
	found := &problem{Code: status.GetCode(), Message: status.GetMessage()}
	for _, detail := range status.GetDetails() {
		info := &errdetails.ErrorInfo{}
		if detail.UnmarshalTo(info) == nil {
			found.Reason = info.Reason
		}
	}
	return found
}

// lineOf is a whole result: `parts` is the text that came before it in messages of its own.
func lineOf(result *pb.Result, parts string) *line {
	made := &line{
		ID:        result.ItemId,
		VariantOf: result.VariantOf,
		State:     strings.TrimPrefix(result.State.String(), "ITEM_STATE_"),
	}
	if completion := result.GetCompletion(); completion != nil {
		content := parts + completion.Content
		made.Content = &content
	}
	if status := result.GetError(); status != nil {
		made.Error = problemOf(status)
	}
	return made
}

// write writes one line, whole, so that who reads has each result at once.
func (l *line) write(out io.Writer) error {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(l)
}
