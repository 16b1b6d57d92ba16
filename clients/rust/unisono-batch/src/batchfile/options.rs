use unisono_client::v1::{Options, RunnerOptions};

use super::fields::{Fields, Problem};

/// What is shown of a value that cannot be.
const MAX_SHOWN_CHARS: usize = 100;

/// Reads Ollama's `options`, and OpenAI's beside it; nothing where nothing is said.
///
/// Both are named whole, so that an option that the contract gains and this list has not does not compile.
pub(super) fn options_of(fields: &mut Fields) -> Result<Option<Options>, Problem> {
    let mut inner = fields.child("options")?;
    let runner = RunnerOptions {
        num_ctx: option(&mut inner, "num_ctx")?,
        num_batch: option(&mut inner, "num_batch")?,
        num_gpu: option(&mut inner, "num_gpu")?,
        main_gpu: option(&mut inner, "main_gpu")?,
        use_mmap: option(&mut inner, "use_mmap")?,
        num_thread: option(&mut inner, "num_thread")?,
        draft_num_predict: option(&mut inner, "draft_num_predict")?,
    };
    let mut options = Options {
        num_keep: option(&mut inner, "num_keep")?,
        seed: option(&mut inner, "seed")?,
        num_predict: option(&mut inner, "num_predict")?,
        top_k: option(&mut inner, "top_k")?,
        top_p: option(&mut inner, "top_p")?,
        min_p: option(&mut inner, "min_p")?,
        typical_p: option(&mut inner, "typical_p")?,
        repeat_last_n: option(&mut inner, "repeat_last_n")?,
        temperature: option(&mut inner, "temperature")?,
        repeat_penalty: option(&mut inner, "repeat_penalty")?,
        presence_penalty: option(&mut inner, "presence_penalty")?,
        frequency_penalty: option(&mut inner, "frequency_penalty")?,
        stop: Vec::new(), // below: OpenAI may have written it too
        runner: (runner != RunnerOptions::default()).then_some(runner),
        extra_options_json: String::new(), // not from a file
    };
    let mut stop = option(&mut inner, "stop")?;
    inner.end()?;

    set_by_openai(fields, "max_tokens", &mut options.num_predict)?;
    set_by_openai(fields, "max_completion_tokens", &mut options.num_predict)?;
    set_by_openai(fields, "temperature", &mut options.temperature)?;
    set_by_openai(fields, "top_p", &mut options.top_p)?;
    set_by_openai(fields, "seed", &mut options.seed)?;
    set_by_openai(fields, "stop", &mut stop)?;
    set_by_openai(fields, "presence_penalty", &mut options.presence_penalty)?;
    set_by_openai(fields, "frequency_penalty", &mut options.frequency_penalty)?;

    options.stop = stop.unwrap_or_default();
    Ok((options != Options::default()).then_some(options))
}

/// Takes what OpenAI writes beside the messages, unless it was said already.
fn set_by_openai<T: Value>(fields: &mut Fields, name: &str, slot: &mut Option<T>) -> Result<(), Problem> {
    if fields.has(name) && slot.is_some() {
        return Err(fields.problem(name, "says again what is said elsewhere; write one of them"));
    }
    if let Some(value) = option(fields, name)? {
        *slot = Some(value);
    }
    Ok(())
}

fn option<T: Value>(fields: &mut Fields, name: &str) -> Result<Option<T>, Problem> {
    let Some(member) = fields.take(name) else { return Ok(None) };
    let read = T::read(member.get());
    if read.is_none() {
        let shown: String = member.get().chars().take(MAX_SHOWN_CHARS).collect();
        return Err(fields.problem(name, &format!("cannot be {shown}")));
    }
    Ok(read)
}

/// What an option can be.
trait Value: Sized {
    /// `None` where the JSON is something else.
    fn read(json: &str) -> Option<Self>;
}

macro_rules! plain_values {
    ($($kind:ty),*) => {
        $(impl Value for $kind {
            fn read(json: &str) -> Option<Self> {
                serde_json::from_str(json).ok()
            }
        })*
    };
}

plain_values!(bool, i32, i64, u32);

impl Value for f32 {
    fn read(json: &str) -> Option<Self> {
        // What is too large for it would become infinite.
        serde_json::from_str(json).ok().filter(|value: &Self| value.is_finite())
    }
}

/// Texts; one of them may stand without a list.
impl Value for Vec<String> {
    fn read(json: &str) -> Option<Self> {
        serde_json::from_str(json).or_else(|_| serde_json::from_str(json).map(|one| vec![one])).ok()
    }
}
