"""The shapes of custom resources that the chart renders, written from their owners' references.

Only what the chart uses is in them: a field that is not here is a typo, or a line to add.
"""

from __future__ import annotations

from typing import Any

import jsonschema


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_PERIOD = {"type": "string", "pattern": "^[0-9]+(s|m|h)$"}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


_POLICY = _object({"type": {"enum": ["Pods", "Percent"]}, "value": _COUNT, "periodSeconds": _COUNT})
_DIRECTION = _object({"stabilizationWindowSeconds": _COUNT}, {"policies": _list(_POLICY)})
_ROUTE = _object(
    {
        "parentRefs": _list(_object({"name": _TEXT}, {"namespace": _TEXT, "sectionName": _TEXT})),
        "hostnames": _list(_TEXT),
        "rules": _list(_object({"backendRefs": _list(_object({"name": _TEXT, "port": _COUNT}))})),
    }
)
# kind -> (apiVersion, spec)
SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "HTTPRoute": ("gateway.networking.k8s.io/v1", _ROUTE),
    "GRPCRoute": ("gateway.networking.k8s.io/v1", _ROUTE),
    "Certificate": (
        "cert-manager.io/v1",
        _object(
            {
                "secretName": _TEXT,
                "commonName": {"type": "string", "maxLength": 64},
                "dnsNames": _list(_TEXT),
                "usages": _list({"enum": ["digital signature", "key encipherment", "server auth", "client auth"]}),
                "privateKey": _object(
                    {
                        "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
                        "rotationPolicy": {"enum": ["Never", "Always"]},
                    }
                ),
                "issuerRef": _object({"name": _TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}}),
            }
        ),
    ),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        _object(
            {
                "scaleTargetRef": _object({"name": _TEXT}),
                "minReplicaCount": _COUNT,
                "maxReplicaCount": _COUNT,
                "pollingInterval": _COUNT,
                "cooldownPeriod": _COUNT,
                "advanced": _object(
                    {
                        "horizontalPodAutoscalerConfig": _object(
                            {"behavior": _object({"scaleUp": _DIRECTION, "scaleDown": _DIRECTION})}
                        )
                    }
                ),
                "triggers": _list(
                    _object(
                        {
                            "type": {"const": "prometheus"},
                            "metadata": _object({"serverAddress": _TEXT, "query": _TEXT, "threshold": _TEXT}),
                        }
                    )
                ),
            }
        ),
    ),
    "ServiceMonitor": (
        "monitoring.coreos.com/v1",
        _object(
            {
                "selector": _object({"matchLabels": _TEXTS}),
                "endpoints": _list(_object({"port": _TEXT, "interval": _PERIOD, "honorLabels": {"type": "boolean"}})),
                "podTargetLabels": _list(_TEXT),
            }
        ),
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        _object(
            {
                "groups": _list(
                    _object(
                        {
                            "name": _TEXT,
                            "rules": _list(
                                _object(
                                    {"alert": _TEXT, "expr": _TEXT, "labels": _TEXTS, "annotations": _TEXTS},
                                    {"for": _PERIOD},
                                )
                            ),
                        }
                    )
                )
            }
        ),
    ),
}


def validate(document: dict[str, Any]) -> None:
    """jsonschema.ValidationError when the resource is not what its owner reads."""
    version, spec = SCHEMAS[document["kind"]]
    metadata = _object({"name": _TEXT, "labels": _TEXTS})
    whole = _object({"apiVersion": {"const": version}, "kind": _TEXT, "metadata": metadata, "spec": spec})
    jsonschema.validate(document, whole)
