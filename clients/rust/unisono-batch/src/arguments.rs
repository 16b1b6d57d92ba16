//! What the program is asked to do.

use std::env;

use clap::Parser;
use clap::builder::NonEmptyStringValueParser;

const DEFAULT_TARGET: &str = "127.0.0.1:50051";
const TARGET_HELP: &str = "Where the service listens [default: UNISONO_TARGET, or 127.0.0.1:50051]";

/// Runs a file of requests as one batch, and writes each result as a line of JSON when it is there
#[derive(Debug, Parser)]
#[command(name = "unisono-batch")]
pub(crate) struct Arguments {
    #[arg(long, help = TARGET_HELP, value_name = "HOST:PORT", value_parser = NonEmptyStringValueParser::new())]
    target: Option<String>,

    /// The model of items that name none
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) model: String,

    /// Goes on with this batch
    #[arg(long, value_name = "BATCH_ID", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) resume: Option<String>,

    /// Results up to this sequence are there already
    #[arg(long, value_name = "SEQUENCE", default_value_t, hide_default_value = true, requires = "resume")]
    pub(crate) after: u64,

    /// JSON lines; - for standard input
    pub(crate) file: String,
}

impl Arguments {
    pub(crate) fn target(&self) -> String {
        let of_environment = || env::var("UNISONO_TARGET").ok().filter(|target| !target.is_empty());
        self.target.clone().or_else(of_environment).unwrap_or_else(|| DEFAULT_TARGET.to_owned())
    }

    /// The command that goes on after a sequence, as a shell takes it.
    pub(crate) fn resume_command(&self, batch_id: &str, sequence: u64) -> String {
        let sequence = sequence.to_string();
        let mut words = vec!["unisono-batch"];
        if let Some(target) = &self.target {
            words.extend(["--target", target]);
        }
        words.extend(["--resume", batch_id, "--after", &sequence]);
        if self.file.starts_with('-') && self.file != "-" {
            words.push("--");
        }
        words.push(&self.file);
        words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
    }
}

fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from([&["unisono-batch"], words].concat())
    }

    #[test]
    fn the_command_that_goes_on_says_what_was_said() {
        let arguments = parsed(&["--target", "h:1", "--model", "m", "a 'b'.jsonl"]).unwrap();
        let command = arguments.resume_command("B", 7);
        assert_eq!(command, r"unisono-batch --target h:1 --resume B --after 7 'a '\''b'\''.jsonl'");
        let arguments = parsed(&["--", "--file"]).unwrap();
        assert_eq!(arguments.resume_command("B", 0), "unisono-batch --resume B --after 0 -- --file");
    }

    #[test]
    fn what_it_says_can_be_read_again() {
        let arguments = parsed(&["--resume", "B", "--after", "18446744073709551615", "-"]).unwrap();
        assert_eq!((arguments.resume.as_deref(), arguments.after), (Some("B"), u64::MAX));
        assert_eq!(arguments.file, "-");
    }

    #[test]
    fn wrong_usage_is_refused() {
        for words in [
            &[][..],
            &["a", "b"],
            &["--nosuch", "a"],
            &["--after", "5", "a"],
            &["--resume", "B", "--after", "-1", "a"],
            &["--resume", "", "a"],
            &["--target", "", "a"],
        ] {
            assert!(parsed(words).is_err(), "{words:?}");
        }
    }
}
