//! What serde_json has only in a way that can panic.

use serde_json::Value;

/// One key more; nothing where that is no object.
pub fn put(object: &mut Value, key: &str, value: impl Into<Value>) {
    if let Some(object) = object.as_object_mut() {
        object.insert(key.to_string(), value.into());
    }
}
