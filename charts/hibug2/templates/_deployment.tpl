{{/* What every pod of the platform is held to: the restricted Pod Security Standard. */}}
{{- define "hibug2.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "hibug2.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "hibug2.pullSecrets" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "hibug2.deployment" -}}
{{- $values := .root.Values -}}
{{- $own := include "hibug2.values" . | fromYaml -}}
{{- $storeClaim := and (hasPrefix "file://" $values.store.url) $values.store.existingClaim -}}
{{- $calls := include "hibug2.calls" . | fromYamlArray -}}
{{- $imagesClaim := and (has "images" $calls) $values.images.existingClaim -}}
{{- $jobs := and (eq .service "enumeration") $values.jobs.enabled -}}
{{- $health := include "hibug2.healthPort" . -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "hibug2.name" . }}
  labels:
    {{- include "hibug2.labels" . | nindent 4 }}
spec:
  {{- if eq $own.autoscaling.mode "none" }}
  replicas: {{ $own.replicas }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "hibug2.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "hibug2.selector" . | nindent 8 }}
      annotations:
        checksum/config: {{ include "hibug2.settings" . | sha256sum }}
        {{- with $own.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ $jobs | ternary (include "hibug2.name" .) (include "hibug2.fullname" .root) }}
      # Only who makes Jobs talks to the API.
      automountServiceAccountToken: {{ $jobs }}
      # Service links would add variables such as HIBUG2_GATEWAY_PORT, which read as settings.
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ $own.terminationGracePeriodSeconds }}
      securityContext:
        {{- include "hibug2.podSecurity" . | nindent 8 }}
      {{- include "hibug2.pullSecrets" . | nindent 6 }}
      topologySpreadConstraints:
        {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
        - topologyKey: {{ . }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          matchLabelKeys: [pod-template-hash]
          labelSelector:
            matchLabels:
              {{- include "hibug2.selector" $ | nindent 14 }}
        {{- end }}
      {{- range $field := list "nodeSelector" "tolerations" "affinity" }}
      {{- with get $own $field }}
      {{ $field }}:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      containers:
        - name: {{ .component | default .service }}
          image: {{ include "hibug2.image" . }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          {{- with .args }}
          args: {{ toJson . }}
          {{- end }}
          envFrom:
            - configMapRef:
                name: {{ include "hibug2.name" . }}
            {{- with $values.store.existingSecret }}
            - secretRef:
                name: {{ . }}
            {{- end }}
          {{- $secrets := dict -}}
          {{- if $values.redis.existingSecret -}}
          {{- $_ := set $secrets "HIBUG2_REDIS_URL" $values.redis -}}
          {{- end -}}
          {{- if and $values.llm.existingSecret (has "llm" $calls) -}}
          {{- $_ := set $secrets "HIBUG2_LLM_API_KEY" $values.llm -}}
          {{- end -}}
          {{- with $secrets }}
          env:
            {{- range $name, $from := . }}
            - name: {{ $name }}
              valueFrom:
                secretKeyRef:
                  name: {{ $from.existingSecret }}
                  key: {{ $from.key }}
            {{- end }}
          {{- end }}
          ports:
            - name: grpc
              containerPort: 50051
            {{- if eq .service "gateway" }}
            - name: http
              containerPort: 8080
            {{- end }}
            {{- if ne $health "50051" }}
            - name: health
              containerPort: {{ $health }}
            {{- end }}
            - name: metrics
              containerPort: 9090
          # The kubelet asks grpc.health.v1 itself; a busy process may miss some liveness calls before it is restarted.
          startupProbe:
            grpc:
              port: {{ $health }}
            periodSeconds: 2
            failureThreshold: 60
          readinessProbe:
            grpc:
              port: {{ $health }}
            periodSeconds: 5
            timeoutSeconds: 2
          livenessProbe:
            grpc:
              port: {{ $health }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          {{- if gt (int $own.preStopSeconds) 0 }}
          lifecycle:
            preStop:
              sleep:
                seconds: {{ $own.preStopSeconds }}
          {{- end }}
          resources:
            {{- toYaml $own.resources | nindent 12 }}
          securityContext:
            {{- include "hibug2.containerSecurity" . | nindent 12 }}
          volumeMounts:
            - name: tmp
              mountPath: /tmp
            {{- if include "hibug2.tls" . }}
            - name: tls
              mountPath: /etc/hibug2/tls
              readOnly: true
            {{- end }}
            {{- if $values.redis.caSecret }}
            - name: redis-ca
              mountPath: /etc/hibug2/redis
              readOnly: true
            {{- end }}
            {{- if $storeClaim }}
            - name: store
              mountPath: {{ trimPrefix "file://" $values.store.url }}
            {{- end }}
            {{- if $imagesClaim }}
            - name: images
              mountPath: {{ $values.images.mountPath }}
              readOnly: true
            {{- end }}
      volumes:
        - name: tmp
          emptyDir:
            sizeLimit: 2Gi
        {{- if include "hibug2.tls" . }}
        - name: tls
          secret:
            secretName: {{ include "hibug2.tlsSecret" . }}
        {{- end }}
        {{- with $values.redis.caSecret }}
        - name: redis-ca
          secret:
            secretName: {{ . }}
            items: [{key: ca.crt, path: ca.crt}]
        {{- end }}
        {{- if $storeClaim }}
        - name: store
          persistentVolumeClaim:
            claimName: {{ $values.store.existingClaim }}
        {{- end }}
        {{- if $imagesClaim }}
        - name: images
          persistentVolumeClaim:
            claimName: {{ $values.images.existingClaim }}
            readOnly: true
        {{- end }}
{{- end -}}
