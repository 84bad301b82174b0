//! Lines for the server's error log, ours and those that the engine writes through `tracing`.

use std::ffi::c_int;
use std::fmt::{self, Write as _};
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::border::Callbacks;

#[derive(Clone, Copy)]
pub enum Level {
    Information = 0,
    Warning = 1,
    Error = 2,
}

static CALLBACKS: OnceLock<Callbacks> = OnceLock::new();

/// From now on lines go to the server. Before, and in tests, they go to standard error.
pub fn set_callbacks(callbacks: Callbacks) {
    // A plugin that is loaded a second time in one process gets the same addresses again.
    let _first = CALLBACKS.set(callbacks);
    let _first = tracing::subscriber::set_global_default(ToServer);
}

pub fn callbacks() -> Option<&'static Callbacks> {
    CALLBACKS.get()
}

pub fn write(level: Level, line: &str) {
    match CALLBACKS.get() {
        // SAFETY: the server's function takes any bytes and keeps none.
        Some(callbacks) => unsafe { (callbacks.log)(level as c_int, line.as_ptr().cast(), line.len()) },
        None => eprintln!("{line}"),
    }
}

/// The engine's events as lines: `message name=value …`. Spans are not shown.
struct ToServer;

impl Subscriber for ToServer {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }
    fn event(&self, event: &Event<'_>) {
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warning,
            _ => Level::Information,
        };
        let mut line = Line { message: String::new(), fields: String::new() };
        event.record(&mut line);
        write(level, &format!("{}{}", line.message, line.fields));
    }
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
        written.expect("writing to a string does not fail");
    }
}
