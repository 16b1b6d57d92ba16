//! The program's own span: the root of the batch's trace.

use std::env;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderInjector;
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, Span, SpanExporter as _};
use tonic::metadata::MetadataMap;

use crate::output::complain;

const NAME: &str = "unisono-batch";
/// A collector that does not answer holds up the end no longer.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A span that has begun. It is exported, over HTTP, only where `OTEL_EXPORTER_OTLP_ENDPOINT` says where to; the
/// service's own spans hang under it in either case.
pub(crate) struct BatchTrace {
    span: Span,
    exporter: Option<SpanExporter>,
}

impl BatchTrace {
    /// Begins the span.
    ///
    /// # Errors
    ///
    /// Where the environment's settings for a collector cannot be right.
    pub(crate) fn start() -> Result<Self, ExporterBuildError> {
        let resource = resource();
        let exporter = exporter(&resource)?;
        let provider =
            SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOn).with_resource(resource).build();
        let tracer = provider.tracer(NAME);
        let span = tracer
            .span_builder(NAME)
            .with_kind(SpanKind::Client)
            .start_with_context(&tracer, &Context::new());
        Ok(Self { span, exporter })
    }

    pub(crate) fn id(&self) -> String {
        self.span.span_context().trace_id().to_string()
    }

    /// Call metadata with a W3C traceparent.
    pub(crate) fn metadata(&self) -> MetadataMap {
        let context = Context::new().with_remote_span_context(self.span.span_context().clone());
        let mut headers = tonic::codegen::http::HeaderMap::new();
        TraceContextPropagator::new().inject_context(&context, &mut HeaderInjector(&mut headers));
        MetadataMap::from_headers(headers)
    }

    /// Ends the span, and exports it.
    pub(crate) async fn end(mut self, batch_id: &str, error: Option<String>) {
        self.span.set_attribute(KeyValue::new("unisono.batch_id", batch_id.to_owned()));
        if let Some(error) = error {
            self.span.set_status(Status::error(error));
        }
        let (Some(exporter), Some(mut data)) = (self.exporter, self.span.exported_data()) else { return };
        data.end_time = SystemTime::now();
        // One span needs no queue and no thread of an exporter's own, whose failures would be heard by nobody.
        match tokio::time::timeout(EXPORT_TIMEOUT, exporter.export(vec![data])).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => complain(format_args!("the trace was not exported: {error}")),
            Err(_) => complain("the trace was not exported: the collector does not answer"),
        }
    }
}

/// Who speaks; the environment (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`) has the last word.
fn resource() -> Resource {
    let about = Resource::builder_empty()
        .with_service_name(NAME)
        .with_detectors(&[Box::new(TelemetryResourceDetector), Box::new(EnvResourceDetector::new())]);
    match set_in_environment("OTEL_SERVICE_NAME") {
        Some(name) => about.with_service_name(name).build(),
        None => about.build(),
    }
}

fn exporter(resource: &Resource) -> Result<Option<SpanExporter>, ExporterBuildError> {
    let is_wanted = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
        .into_iter()
        .any(|name| set_in_environment(name).is_some());
    if !is_wanted {
        return Ok(None);
    }
    let mut exporter = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).build()?;
    exporter.set_resource(resource);
    Ok(Some(exporter))
}

fn set_in_environment(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
