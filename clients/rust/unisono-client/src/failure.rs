use std::fmt;

use tonic::Code;
use tonic_types::{ErrorInfo, RpcStatusExt, StatusExt};

/// Why a call failed, or an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs: one of the list in the service's README. Empty where the status does not come from the service,
    /// such as that of a lost connection.
    pub reason: String,
    /// Which kind of failure.
    pub code: Code,
    /// For people.
    pub message: String,
}

impl Failure {
    fn new(info: Option<ErrorInfo>, code: Code, message: &str) -> Self {
        let reason = info.map(|info| info.reason).unwrap_or_default();
        Self { reason, code, message: message.to_owned() }
    }
}

impl From<&tonic::Status> for Failure {
    fn from(status: &tonic::Status) -> Self {
        Self::new(status.get_details_error_info(), status.code(), status.message())
    }
}

impl From<&tonic_types::Status> for Failure {
    fn from(status: &tonic_types::Status) -> Self {
        Self::new(status.get_details_error_info(), Code::from(status.code), &status.message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason.as_str() {
            "" => write!(f, "{:?}: {}", self.code, self.message),
            reason => write!(f, "{reason}: {}", self.message),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn the_reason_is_in_the_details() {
        let details = ErrorDetails::with_error_info("BATCH_FULL", "unisono.dev", []);
        let status = tonic::Status::with_error_details(Code::ResourceExhausted, "no more", details);
        let failure = Failure::from(&status);
        assert_eq!((failure.reason.as_str(), failure.code), ("BATCH_FULL", Code::ResourceExhausted));
        assert_eq!(failure.to_string(), "BATCH_FULL: no more");
    }

    #[test]
    fn a_lost_connection_has_no_reason() {
        let failure = Failure::from(&tonic::Status::unavailable("reset"));
        assert_eq!(failure.reason, "");
        assert_eq!(failure.to_string(), "Unavailable: reset");
    }
}
