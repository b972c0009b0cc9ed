//! Whether JSON is as a schema in packaging/schemas says, by the keywords that those have, and no other. A whole validator
//! would be some sixty crates; tests/schemas has one look at the same files.

use regex_lite::Regex;
use serde_json::Value;
use std::fs;

fn read(file: &str) -> Value {
    let path = format!("{}/packaging/schemas/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What of `value` is not as `NAME.schema.json` says, a line each. A key that it does not name is a mistake in our own
/// output, though not to those who read it.
pub fn mistakes(name: &str, value: &Value) -> Vec<String> {
    let file = format!("{name}.schema.json");
    let mut mistakes = Vec::new();
    let document = read(&file);
    Look { file: &file, document: &document }.at(&document, value, "", &mut mistakes);
    mistakes
}

/// A schema, and the document that its references are in.
struct Look<'a> {
    file: &'a str,
    document: &'a Value,
}

impl Look<'_> {
    fn at(&self, schema: &Value, value: &Value, path: &str, mistakes: &mut Vec<String>) {
        let mut wrong = |what: String| mistakes.push(format!("{}: {path}: {what}: {value}", self.file));
        for (keyword, rule) in schema.as_object().unwrap_or_else(|| panic!("{}: {schema} is no schema", self.file)) {
            let is_right = match keyword.as_str() {
                "$schema" | "title" | "description" | "default" | "$defs" => true,
                "properties"
                | "patternProperties"
                | "additionalProperties"
                | "items"
                | "prefixItems"
                | "anyOf"
                | "$ref" => {
                    continue;
                }
                "type" => list(rule).iter().any(|name| is_a(name.as_str().unwrap(), value)),
                "enum" => list(rule).contains(value),
                "const" => rule == value,
                "minimum" => value.as_f64().is_none_or(|number| number >= rule.as_f64().unwrap()),
                "maximum" => value.as_f64().is_none_or(|number| number <= rule.as_f64().unwrap()),
                "pattern" => {
                    value.as_str().is_none_or(|text| Regex::new(rule.as_str().unwrap()).unwrap().is_match(text))
                }
                "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= rule.as_u64().unwrap()),
                "required" => value
                    .as_object()
                    .is_none_or(|object| list(rule).iter().all(|key| object.contains_key(key.as_str().unwrap()))),
                other => panic!("{}: the keyword {other} is not known here", self.file),
            };
            if !is_right {
                wrong(format!("not {keyword} {rule}"));
            }
        }
        self.refer(schema, value, path, mistakes);
        // Those without a rule of their own go by that for all.
        let own = schema.get("prefixItems").map(list).unwrap_or_default();
        for (n, item) in value.as_array().into_iter().flatten().enumerate() {
            if let Some(rule) = own.get(n).or(schema.get("items")) {
                self.at(rule, item, &format!("{path}/{n}"), mistakes);
            }
        }
        self.keys(schema, value, path, mistakes);
    }

    fn refer(&self, schema: &Value, value: &Value, path: &str, mistakes: &mut Vec<String>) {
        match schema.get("$ref").and_then(Value::as_str).map(|to| to.split_once('#').unwrap_or((to, ""))) {
            None => {}
            Some(("", pointer)) => self.at(self.document.pointer(pointer).unwrap(), value, path, mistakes),
            Some((file, pointer)) => {
                let document = read(file);
                Look { file, document: &document }.at(document.pointer(pointer).unwrap(), value, path, mistakes);
            }
        }
        if let Some(choices) = schema.get("anyOf") {
            let mut each: Vec<Vec<String>> = Vec::new();
            for choice in list(choices) {
                let mut found = Vec::new();
                self.at(&choice, value, path, &mut found);
                each.push(found);
            }
            if each.iter().all(|found| !found.is_empty()) {
                mistakes.extend(each.into_iter().flatten());
            }
        }
    }

    fn keys(&self, schema: &Value, value: &Value, path: &str, mistakes: &mut Vec<String>) {
        let (Some(object), Some(known)) =
            (value.as_object(), schema.get("properties").or(schema.get("patternProperties")))
        else {
            return;
        };
        assert!(schema.get("additionalProperties").is_none_or(|more| *more == Value::Bool(false)), "{schema}");
        for (key, inner) in object {
            let is_pattern = schema.get("patternProperties").is_some();
            let fits = |name: &String| if is_pattern { Regex::new(name).unwrap().is_match(key) } else { name == key };
            match known.as_object().unwrap().iter().find(|(name, _)| fits(name)) {
                Some((_, rule)) => self.at(rule, inner, &format!("{path}/{key}"), mistakes),
                None => mistakes.push(format!("{}: {path}: {key} is not named there: add it", self.file)),
            }
        }
    }
}

fn list(rule: &Value) -> Vec<Value> {
    rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()])
}

fn is_a(name: &str, value: &Value) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("the type {other} is not known here"),
    }
}
