use std::time::Duration;

use tonic::transport::Endpoint;

// A service whose machine vanished is noticed in half a minute; it permits a ping every ten seconds.
const PING_AFTER: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A text that says no place where a service could listen.
#[derive(Debug, thiserror::Error)]
#[error("{target:?} is no target: {problem}")]
pub struct TargetError {
    target: String,
    problem: String,
}

/// Where a service listens, `HOST:PORT`, as an endpoint that notices a service that has vanished.
///
/// With the feature `tls` it may begin with `https://`.
///
/// # Errors
///
/// Where the text cannot be such a place.
pub fn endpoint(target: &str) -> Result<Endpoint, TargetError> {
    let refused = |problem: &str| TargetError { target: target.to_owned(), problem: problem.to_owned() };
    let has_scheme = target.starts_with("http://") || target.starts_with("https://");
    let address = if has_scheme { target.to_owned() } else { format!("http://{target}") };
    let endpoint = Endpoint::new(address).map_err(|error| refused(&in_words(&error)))?;
    let uri = endpoint.uri();
    if uri.port_u16().is_none() || uri.host().is_none_or(str::is_empty) || uri.path() != "/" {
        return Err(refused("it should be HOST:PORT"));
    }
    if uri.scheme_str() == Some("https") && !cfg!(feature = "tls") {
        return Err(refused("https needs the feature tls"));
    }
    Ok(endpoint.http2_keep_alive_interval(PING_AFTER).keep_alive_timeout(PING_TIMEOUT))
}

/// An error and what it was caused by; tonic's own says little.
fn in_words(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", in_words(cause)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_a_port_are_a_target() {
        for target in ["127.0.0.1:50051", "localhost:1", "[::1]:50051", "http://localhost:50051"] {
            assert!(endpoint(target).is_ok(), "{target}");
        }
    }

    #[test]
    fn anything_else_is_told() {
        for target in
            ["", "localhost", ":50051", "a b:1", "localhost:x", "dns:///localhost:1", "localhost:1/path"]
        {
            let error = endpoint(target).unwrap_err().to_string();
            assert!(error.contains(&format!("{target:?} is no target: ")), "{error}");
        }
    }

    #[test]
    #[cfg(not(feature = "tls"))]
    fn encryption_needs_its_feature() {
        let error = endpoint("https://localhost:1").unwrap_err().to_string();
        assert!(error.ends_with("https needs the feature tls"), "{error}");
    }
}
