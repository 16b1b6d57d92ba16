//! A client of Unisono, which runs whole batches of conversations through Ollama.
//!
//! [`v1`] is the contract as code; its [`BatchInferenceClient`](v1::batch_inference_client::BatchInferenceClient) has
//! the calls. [`endpoint`] makes a connection out of a target, and [`Failure`] says why a call, or an item, failed.

mod failure;
mod target;

pub use failure::Failure;
pub use target::{TargetError, endpoint};
// A program that names these by itself must have the very same versions.
pub use {prost, prost_types, tonic, tonic_types};

/// The contract, `unisono.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("unisono.v1");
}

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
